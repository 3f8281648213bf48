"""Products in fp8: near the plain ones, with scales that change no digit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.parallel.fp8 import E4M3, E5M2, Fp8Linear, Fp8Products, fp8_linear, product, scale, use_fp8


def numbers(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).bfloat16()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_product(by_row: bool, kind: torch.dtype, size: float) -> None:
    """e4m3 keeps 4 digits of a number, e5m2 3: half of the last one is what rounding takes at most."""
    a, b = numbers(32, 64) * size, numbers(64, 48, seed=1)
    expected = a.double() @ b.double()
    found = product(a, b, by_row, kind)
    assert found.dtype == torch.bfloat16
    assert 0 < apart(found, expected) < (0.05 if kind == E4M3 else 0.08)
    assert apart(product(a, b, by_row, kind, fast=True), found) == 0


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_a_cpus_product_is_torchs_own(kind: torch.dtype) -> None:
    """The plain one of a CPU, against torch's operation of a GPU, which a CPU has too."""
    a, b = numbers(32, 64), numbers(64, 48, seed=1)
    a_scale, b_scale = scale(a, kind, None), scale(b, E4M3, None)
    a8, b8 = (a * a_scale).to(kind), (b * b_scale).to(E4M3).t().contiguous().t()
    one = torch._scaled_mm(a8, b8, 1 / a_scale.float(), 1 / b_scale.float(), out_dtype=torch.bfloat16)
    assert apart(product(a, b, False, kind), one) < 1e-3  # a sum in another order may be rounded the other way


def test_zeros_give_zeros() -> None:
    assert not product(torch.zeros(16, 16).bfloat16(), numbers(16, 16), False).any()
    assert not product(torch.zeros(16, 16).bfloat16(), torch.zeros(16, 16).bfloat16(), True, E5M2).any()


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_scales_are_powers_of_two_that_fill_the_range(kind: torch.dtype) -> None:
    x = numbers(50, 40) * torch.logspace(-12, 12, 50).unsqueeze(1).bfloat16()
    for dim in (None, 0, 1):
        found = scale(x, kind, dim)
        assert bool((found.log2() == found.log2().round()).all())
        largest = (x * found).abs().amax() if dim is None else (x * found).abs().amax(dim)
        assert bool((largest <= torch.finfo(kind).max).all())
        assert bool((largest > torch.finfo(kind).max / 2.02).all())


def test_a_part_scaled_alone_is_that_part_of_the_whole() -> None:
    """So micro-batches, replicas and shares of matrices need not agree on a scale. Numbers at the very end of the range
    have fewer digits, and are too small to be seen."""
    a, b = numbers(32, 64), numbers(64, 48, seed=1)
    a[:16] *= 0.07  # another scale
    assert scale(a[:16], E4M3, None) != scale(a, E4M3, None)
    exact = a[:16].double() @ b.double()
    part, whole = product(a[:16], b, False), product(a, b, False)[:16]
    assert apart(part, whole) < 0.05 * apart(part, exact)


@pytest.mark.parametrize("by_row", [False, True])
def test_linear_and_its_gradients(by_row: bool) -> None:
    x, weight, grad = numbers(2, 16, 32), numbers(48, 32, seed=1), numbers(2, 16, 48, seed=2)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    found, expected = fp8_linear(*leaves, Fp8Products(by_row)), F.linear(*plain)
    found.backward(grad)
    expected.backward(grad)
    assert 0 < apart(found.detach(), expected.detach()) < 0.05
    for one, other in zip(leaves, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert 0 < apart(one.grad, other.grad) < 0.08


def test_first_and_last_block_and_head_stay_in_bf16() -> None:
    shape = Shape(num_layers=4, hidden=32, num_heads=2, ffn=64, vocab=67, max_seq=16)
    for blocks in (range(4), range(2), range(2, 4)):
        model = Decoder(shape, blocks)
        use_fp8(model.blocks, shape.num_layers, by_row=False)
        found = {name.rpartition(".")[0] for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
        assert found == {f"blocks.{i}.{part}" for i in {1, 2} & set(blocks) for part in ("attention", "mlp")}
        assert sum(isinstance(m, nn.Linear) and not isinstance(m, Fp8Linear) for m in model.modules()) == 7 + (
            blocks.stop == 4
        ) + 7 * (len(blocks) == 4)
