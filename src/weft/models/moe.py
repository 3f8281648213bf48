"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al., 2017; Mixtral, 2024).

Nothing is padded: tokens are sorted by expert, and each expert's products are as long as its share. Nothing is dropped
either, unless a capacity is set: see models/balance.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.balance import Balance
from weft.models.grouped import grouped_mm
from weft.models.mlp import SwigluMLP
from weft.models.shape import Shape

SMALLEST = 1e-20
"""A sum that weights are divided by is at least this."""


class MoE(nn.Module):
    """Router and experts, in the place of a block's MLP; beside them, for some models, an MLP that every token meets."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = Router(shape)
        self.experts = Experts(shape)
        shared = shape.shared_ffn
        self.shared = SwigluMLP(shape, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, D]"""
        # routed last: what is computed again in backward ends inside, before FSDP2's hooks behind the experts
        return self.routed(x) if self.shared is None else self.shared(x) + self.routed(x)

    def routed(self, x: Tensor, *more: Any) -> Tensor:
        """`more`: for what stands in the experts' place."""
        numbers, weights = self.router(x)
        return self.experts(x.flatten(0, 1), numbers.flatten(0, 1), weights.flatten(0, 1), *more).view_as(x)


class Router(nn.Module):
    """Chooses each token's experts. In fp32 always: two scores that nearly tie decide where a token goes.

    Attributes:
        bias: added to the scores where experts are chosen, not where they are weighed: fp32, [X]. Of sigmoid scores
            alone (DeepSeek-V3 Technical Report, 2024, 2.1.2); no gradient reaches it.
    """

    bias: Tensor | None
    balance: Balance | None = None  # in training

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.experts = shape.experts
        self.weight = nn.Parameter(normal(shape.experts.num_experts, shape.hidden, shape.init_std))
        self.register_buffer("bias", torch.zeros(shape.experts.num_experts) if shape.experts.has_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → numbers of each token's experts and what they weigh in its sum, both [B, T, k]."""
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.experts.scores == "sigmoid" else logits.softmax(dim=-1)
        numbers = self.choose(scores.detach())
        weights = scores.gather(-1, numbers)
        if self.experts.norm_topk:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + SMALLEST)
        weights = weights if self.experts.scaling == 1 else weights * self.experts.scaling
        if self.balance is None or not torch.is_grad_enabled():
            return numbers, weights
        return self.balance.observe(numbers, weights, logits, scores)

    def choose(self, scores: Tensor) -> Tensor:
        """scores [B, T, X] → numbers of each token's experts, [B, T, k]."""
        if self.bias is not None:
            scores = scores + self.bias
        if self.experts.groups > 1:
            scores = self.in_best_groups(scores)
        return scores.topk(self.experts.per_token, dim=-1).indices

    def in_best_groups(self, scores: Tensor) -> Tensor:
        """The same scores; -inf outside of each token's best groups (DeepSeek-V2, 2024, 2.2.2).

        Groups are as good as their best expert, by sigmoid scores as their best two together.
        """
        groups = scores.unflatten(-1, (self.experts.groups, -1))
        good = groups.topk(2 if self.experts.scores == "sigmoid" else 1, dim=-1).values.sum(dim=-1)
        best = torch.zeros_like(good, dtype=torch.bool)
        best.scatter_(-1, good.topk(self.experts.top_groups, dim=-1).indices, True)
        return groups.masked_fill(~best.unsqueeze(-1), -math.inf).flatten(-2)


class Experts(nn.Module):
    """The MLPs (SwiGLU) of all experts, stacked by rows: [X·F, D] each.

    `down` lies there transposed, with the ffn dim as its rows, so that every one of the three can be cut anywhere along
    its rows: by experts, inside of an expert, or by FSDP.
    """

    drops = False  # whether there are pairs of a token and no expert: see Order

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.ffn = shape.experts.ffn  # rows of one expert
        rows = shape.experts.num_experts * self.ffn
        self.gate, self.up, self.down = (nn.Parameter(normal(rows, shape.hidden, shape.init_std)) for _ in range(3))

    def forward(self, tokens: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """tokens [N, D], their experts' numbers and weights [N, k] → each token's weighted sum, [N, D]."""
        order = Order(numbers, len(self.gate) // self.ffn, self.drops)
        scale = weights.flatten()[order.pairs].to(tokens.dtype)
        return Combine.apply(self.compute(Dispatch.apply(tokens, order), scale, order.counts), order)

    def compute(self, x: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert through their expert's MLP.

        Args:
            x: [R, D].
            scale: what each row's result is multiplied with, [R]; done to the F numbers inside, which are fewer.
            counts: rows of each expert held here, [X].
        """
        gate, up, down = (weight.unflatten(0, (-1, self.ffn)) for weight in (self.gate, self.up, self.down))
        hidden = F.silu(grouped_mm(x, gate.mT, counts)) * grouped_mm(x, up.mT, counts)
        return grouped_mm(hidden * scale.unsqueeze(-1), down, counts)


def normal(rows: int, columns: int, std: float) -> Tensor:
    """A random matrix; on meta, where there are no numbers, none is drawn (see make_embedding)."""
    matrix = torch.empty(rows, columns)
    return matrix if matrix.is_meta else nn.init.normal_(matrix, std=std)


class Order:
    """Pairs of a token and one of its experts, sorted by expert: R of them, N·k where none is dropped.

    Attributes:
        pairs: the pair that stands in each place, as token · k + choice, [R].
        tokens: the token of each place, [R].
        places: where each token's pairs stand, [N, k]; R: nowhere.
        counts: pairs of each expert, [X].
    """

    def __init__(self, numbers: Tensor, num_experts: int, drops: bool = False) -> None:
        """numbers [N, k]; drops: among them may be X, which is no expert."""
        pairs = numbers.flatten()
        self.pairs = pairs.argsort(stable=True)
        self.counts = torch.bincount(pairs, minlength=num_experts)
        if drops:
            self.counts = self.counts[:num_experts]
            self.pairs = self.pairs[: int(self.counts.sum())]
        self.tokens = self.pairs // numbers.shape[1]
        places = torch.full_like(pairs, len(self.pairs))
        places[self.pairs] = torch.arange(len(self.pairs), device=numbers.device)
        self.places = places.view_as(numbers)

    def sums(self, rows: Tensor) -> Tensor:
        """rows [R, D] → the sum of each token's, [N, D]."""
        if len(rows) < self.places.numel():
            rows = F.pad(rows, (0, 0, 0, 1))  # zeros for what is nowhere
        if rows.device.type == "cpu":  # one pass over the rows, where gathering them first takes three
            return F.embedding_bag(self.places, rows, mode="sum")
        return rows[self.places].sum(dim=1)


class Dispatch(torch.autograd.Function):
    """Tokens [N, D] → a row for each pair, in order, [R, D].

    The gradient of a token is the sum of its rows', taken choice by choice: torch's own scatter adds up in any order, so
    that on a GPU no two runs would be the same.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return tokens.index_select(0, order.tokens)  # on a CPU four times as fast as tokens[…]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.order.sums(grad), None


class Combine(torch.autograd.Function):
    """Dispatch's mirror: rows [R, D] → the sum of each token's, [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.sums(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.tokens), None
