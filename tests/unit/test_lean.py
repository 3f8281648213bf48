"""What was made faster or leaner against its plain reference: RMSNorm, the head, the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.models import head as heads
from weft.models.head import Head
from weft.models.norm import RMSNorm
from weft.parallel import loss
from weft.parallel.loss import IGNORED, cross_entropy_sum, linear_cross_entropy_sum


@pytest.fixture(params=[(), ("cpu",)], ids=["as a CPU", "as a GPU"])
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without and with what lies behind the rows of logits."""
    monkeypatch.setattr(heads, "ROUNDED", request.param)


def apart(a: Tensor, b: Tensor) -> float:
    """Difference over size."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_is_torchs(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(2, 3, 4, 48).to(dtype), torch.randn(2, 3, 4, 48).to(dtype)
    found = []
    for run in (norm, lambda x: F.rms_norm(x, (48,), norm.weight, 1e-5)):
        norm.weight.grad = None
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(grad)
        assert leaf.grad is not None
        assert norm.weight.grad is not None
        found.append((y.detach(), leaf.grad, norm.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) < bound
    with torch.no_grad():
        assert torch.equal(norm(x), found[0][0])


def test_rms_norm_is_differentiated_rightly() -> None:
    norm = RMSNorm(5, eps=1e-5)
    x = torch.randn(3, 5, requires_grad=True)
    step, direction = 1e-3, torch.randn(3, 5)
    (norm(x) ** 2).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        there, here = ((norm(x + sign * step * direction) ** 2).sum() for sign in (1, -1))
    assert float((x.grad * direction).sum()) == pytest.approx(float(there - here) / (2 * step), abs=2e-2)


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("vocab", [61, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_a_linear_layer(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = Head(16, vocab).to(dtype)
    x, grad = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, vocab).to(dtype)
    found = []
    for run in (head, lambda x: F.linear(x, head.weight)):
        head.weight.grad = None
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(grad)
        assert leaf.grad is not None
        assert head.weight.grad is not None
        found.append((y.detach(), leaf.grad, head.weight.grad))
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) < 1e-6
    assert head(x).stride()[1] % 64 == 0


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("at_once", [2**19, 200, 1])
def test_the_loss_is_torchs_whatever_is_worked_on_at_once(
    dtype: torch.dtype, bound: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPU_LOGITS", at_once)
    torch.manual_seed(0)
    head = Head(16, 61).to(dtype)
    x, targets = torch.randn(2, 7, 16).to(dtype), torch.randint(61, (2, 7))
    targets[0, 3] = targets[1, 0] = IGNORED
    plain = x.clone().requires_grad_()
    expected = F.cross_entropy(head(plain).float().flatten(0, 1), targets.flatten(), reduction="sum")
    (expected / 12).backward()
    leaf = x.clone().requires_grad_()
    total = cross_entropy_sum(head(leaf), targets)
    (total / 12).backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert leaf.grad is not None
    assert plain.grad is not None
    assert apart(leaf.grad, plain.grad) < bound


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (3, 16), (1, 7)])
def test_the_loss_without_logits_is_the_loss_of_logits(
    dtype: torch.dtype, bound: float, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "HEAD_ROWS", rows)
    monkeypatch.setattr(loss, "HEAD_COLUMNS", columns)
    torch.manual_seed(0)
    head = Head(16, 61).to(dtype)
    x, targets = torch.randn(2, 7, 16).to(dtype), torch.randint(61, (2, 7))
    targets[0, 3] = targets[1, 0] = IGNORED
    found = []
    for run in (
        lambda x: F.cross_entropy(head(x).float().flatten(0, 1), targets.flatten(), reduction="sum"),
        lambda x: linear_cross_entropy_sum(x, head.weight, targets),
    ):
        head.weight.grad = None
        leaf = x.clone().requires_grad_()
        total = run(leaf)
        (total / 12).backward()
        assert leaf.grad is not None
        assert head.weight.grad is not None
        found.append((total.detach(), leaf.grad, head.weight.grad))
    assert found[1][0].dtype == torch.float32
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) < bound
    with torch.no_grad():
        assert float(linear_cross_entropy_sum(x, head.weight, targets)) == float(found[1][0])


def by_head(head: Head, x: Tensor, targets: Tensor) -> Tensor:
    logits = head(x)
    assert logits.stride(-2) == 128
    assert not logits.as_strided((*x.shape[:-1], 128 - 67), logits.stride(), 67).any(), "between the rows"
    return cross_entropy_sum(logits, targets)


def by_parts(head: Head, x: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_sum(x, head.weight, targets)


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("way", [by_head, by_parts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_an_odd_vocabulary_are_numbers_whatever_was_in_memory(
    way: Callable[[Head, Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """A CPU's tiles (AMX) multiply the number behind each row of odd length by 0: bf16 gradients were NaN now and then."""
    torch.manual_seed(0)
    head = Head(32, 67)
    x, targets = torch.randn(2, 32, 32, requires_grad=True), torch.randint(67, (2, 32))
    exact = torch.autograd.grad(way(head, x, targets), (x, head.weight))
    head, low = head.to(dtype), x.detach().to(dtype).requires_grad_()
    torch.use_deterministic_algorithms(True)  # then torch fills with NaN what it leaves empty
    try:
        assert torch.empty(1).isnan()
        found = torch.autograd.grad(way(head, low, targets), (low, head.weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert max(apart(a, b) for a, b in zip(found, exact, strict=True)) < 2e-2
