"""Experts against their plain definition: each token's weighted sum over the experts of its choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.models.grouped import grouped_mm
from weft.models.moe import Experts, MoE, Order
from weft.models.shape import Shape


def shape(num_experts: int = 5, per_token: int = 2, **over: object) -> Shape:
    experts = {"num_experts": num_experts, "per_token": per_token, "ffn": 12, **over}
    sizes = {"num_layers": 1, "hidden": 8, "num_heads": 2, "ffn": 12, "vocab": 16, "max_seq": 8}
    return Shape.model_validate({**sizes, "experts": experts})


def plain(experts: Experts, tokens: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
    """The definition, token by token."""
    gate, up, down = (weight.unflatten(0, (-1, experts.ffn)) for weight in (experts.gate, experts.up, experts.down))
    rows = []
    for token, chosen, weighs in zip(tokens, numbers.tolist(), weights, strict=True):
        outputs = [down[e].t() @ (F.silu(gate[e] @ token) * (up[e] @ token)) for e in chosen]
        rows.append(sum(weight * y for weight, y in zip(weighs, outputs, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.data())
def test_experts_are_the_plain_sum(num_experts: int, num_tokens: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    per_token = data.draw(st.integers(1, num_experts))
    experts = Experts(shape(num_experts, per_token)).double()
    numbers = torch.stack([torch.randperm(num_experts)[:per_token] for _ in range(num_tokens)])
    tokens = torch.randn(num_tokens, 8, dtype=torch.double, requires_grad=True)
    weights = torch.rand(num_tokens, per_token, dtype=torch.double, requires_grad=True)
    given_to = (tokens, weights, *experts.parameters())
    grad = torch.randn(num_tokens, 8, dtype=torch.double)
    ours = experts(tokens, numbers, weights)
    theirs = plain(experts, tokens, numbers, weights)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours, given_to, grad)
    wanted = torch.autograd.grad(theirs, given_to, grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_an_expert_without_tokens_has_a_gradient_of_zero(num_tokens: int) -> None:
    """Not none: whoever adds gradients up over processes waits for every one."""
    experts = Experts(shape(4))
    tokens = torch.randn(num_tokens, 8, requires_grad=True)
    experts(
        tokens, torch.tensor([[2, 0]] * num_tokens, dtype=torch.long).view(-1, 2), torch.ones(num_tokens, 2)
    ).sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        of_experts = weight.grad.unflatten(0, (4, -1))
        assert not of_experts[[1, 3]].any()
        assert bool(of_experts[2].any()) == bool(num_tokens)


def test_order_is_by_expert_and_then_as_the_tokens_come() -> None:
    order = Order(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert order.counts.tolist() == [2, 2, 2, 0]
    assert order.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert torch.equal(order.pairs[order.places], torch.arange(6).view(3, 2))


def test_grouped_products_are_those_of_torch() -> None:
    """Its own kernel, which GPUs use, takes the same arguments."""
    x, matrices = torch.randn(24, 16), torch.randn(3, 32, 16)
    counts = torch.tensor([7, 0, 17])
    offsets = counts.cumsum(0, dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(x, matrices.mT, counts), F.grouped_mm(x, matrices.mT, offs=offsets))


def test_the_router_works_in_fp32() -> None:
    moe = MoE(shape()).bfloat16()
    x = torch.randn(2, 4, 8).bfloat16()
    numbers, weights = moe.router(x)
    scores = (x.float() @ moe.router.weight.float().t()).softmax(-1)
    top = scores.topk(2)
    assert torch.equal(numbers, top.indices)
    torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))
    assert weights.dtype == torch.float32
    assert moe(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("drops", [False, True])
def test_sums_of_a_tokens_rows_are_those_that_gathering_gives(dtype: torch.dtype, drops: bool) -> None:
    numbers = torch.randint(0, 5 + drops, (9, 3))  # 5 is no expert
    order = Order(numbers, 5, drops)
    rows = torch.randn(len(order.pairs), 16).to(dtype)
    padded = torch.cat([rows, torch.zeros(1, 16, dtype=dtype)])
    expected = padded[order.places].double().sum(dim=1)
    torch.testing.assert_close(
        order.sums(rows).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )
