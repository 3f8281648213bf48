"""Balance of experts in one process: losses against their formulas, drops against a count by hand."""

from __future__ import annotations

import pytest
import torch

from weft.models.balance import Balance
from weft.models.moe import MoE, Order
from weft.models.shape import Experts, Shape

EXPERTS = Experts(num_experts=4, per_token=2, ffn=8)
CPU = torch.device("cpu")


def test_losses_are_their_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 4, requires_grad=True)
    scores = logits.softmax(dim=-1)
    numbers = scores.detach().topk(2, dim=-1).indices
    balance = Balance(EXPERTS, CPU, sequence=0.3, z=0.2)
    balance.begin(3, 4.0)
    _, weights = balance.observe(numbers, scores.gather(-1, numbers), logits, scores)
    (weights.sum() * 4.0).backward(retain_graph=True)
    taken, logits.grad = logits.grad, None
    wanted = torch.zeros(())
    for tokens, row in zip(scores, logits, strict=True):  # DeepSeek-V3, equations 17 to 20; ST-MoE, equation 5
        chosen = torch.zeros(6, 4).scatter(1, tokens.topk(2).indices, 1.0)
        frequency, share = 4 / (2 * 6) * chosen.sum(dim=0), tokens.mean(dim=0)
        wanted = wanted + 0.3 * (frequency * share).sum() / 3
        wanted = wanted + 0.2 * row.exp().sum(dim=-1).log().square().sum() / 18
    (4.0 * (scores.gather(-1, numbers).sum() + wanted)).backward()
    torch.testing.assert_close(taken, logits.grad)
    torch.testing.assert_close(balance.loss, wanted.detach())
    assert balance.load.sum() == 3 * 6 * 2


@pytest.mark.parametrize(("capacity", "room"), [(0.5, 2), (1.0, 3), (2.0, 6)])
def test_the_first_tokens_find_room(capacity: float, room: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 6, 4) + torch.tensor([2.0, 0, 0, 0])
    scores = logits.softmax(dim=-1)
    numbers = scores.topk(2, dim=-1).indices
    balance = Balance(EXPERTS, CPU, capacity=capacity)
    kept, _ = balance.observe(numbers, scores.gather(-1, numbers), logits, scores)
    for sequence, left in zip(numbers.flatten(1).tolist(), kept.flatten(1).tolist(), strict=True):
        seen = dict.fromkeys(range(4), 0)
        for expert, now in zip(sequence, left, strict=True):
            seen[expert] += 1
            assert now == (expert if seen[expert] <= room else 4)
    assert balance.dropped == (kept == 4).sum()
    assert (balance.dropped > 0) == (capacity < 2)


def test_a_dropped_token_has_no_part_in_its_expert() -> None:
    shape = Shape(
        family="mixtral", num_layers=1, hidden=8, num_heads=2, ffn=8, vocab=8, max_seq=8,
        experts={"num_experts": 4, "per_token": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    experts = MoE(shape).experts
    experts.drops = True
    tokens = torch.randn(3, 8, requires_grad=True)
    numbers, weights = torch.tensor([[0, 1], [4, 1], [4, 4]]), torch.rand(3, 2, requires_grad=True)
    y = experts(tokens, numbers, weights)
    alone = experts(tokens[1:2], torch.tensor([[1, 4]]), weights[1:2].flip(1))
    torch.testing.assert_close(y[1:2], alone)
    assert torch.equal(y[2], torch.zeros(8))
    y.square().sum().backward()
    assert tokens.grad is not None
    assert weights.grad is not None
    assert torch.equal(tokens.grad[2], torch.zeros(8))
    assert weights.grad[1, 0] == 0
    assert weights.grad[1, 1] != 0


def test_order_without_some_pairs() -> None:
    order = Order(torch.tensor([[2, 0], [3, 1], [2, 3]]), 3, drops=True)
    assert order.pairs.tolist() == [1, 3, 0, 4]
    assert order.counts.tolist() == [1, 1, 2]
    assert order.places.tolist() == [[2, 0], [4, 1], [3, 4]]
