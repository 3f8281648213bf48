"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al., 2017; Mixtral, 2024).

Nothing is dropped and nothing padded: tokens are sorted by expert, and each expert's products are as long as its share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.grouped import grouped_mm
from weft.models.shape import Shape


class MoE(nn.Module):
    """Router and experts, in the place of a block's MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = Router(shape)
        self.experts = Experts(shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, D]"""
        return self.routed(x)

    def routed(self, x: Tensor) -> Tensor:
        numbers, weights = self.router(x)
        return self.experts(x.flatten(0, 1), numbers.flatten(0, 1), weights.flatten(0, 1)).view_as(x)


class Router(nn.Module):
    """Chooses each token's experts. In fp32 always: two scores that nearly tie decide where a token goes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.experts = shape.experts
        self.weight = nn.Parameter(normal(shape.experts.num_experts, shape.hidden, shape.init_std))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → numbers of each token's experts and what they weigh in its sum, both [B, T, k]."""
        scores = F.linear(x.float(), self.weight.float()).softmax(dim=-1)
        weights, numbers = scores.topk(self.experts.per_token, dim=-1)
        if self.experts.norm_topk:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return numbers, weights


class Experts(nn.Module):
    """The MLPs (SwiGLU) of all experts, stacked by rows: [X·F, D] each.

    `down` lies there transposed, with the ffn dim as its rows, so that every one of the three can be cut anywhere along
    its rows: by experts, inside of an expert, or by FSDP.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.ffn = shape.experts.ffn  # rows of one expert
        rows = shape.experts.num_experts * self.ffn
        self.gate, self.up, self.down = (nn.Parameter(normal(rows, shape.hidden, shape.init_std)) for _ in range(3))

    def forward(self, tokens: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """tokens [N, D], their experts' numbers and weights [N, k] → each token's weighted sum, [N, D]."""
        order = Order(numbers, len(self.gate) // self.ffn)
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
    """Pairs of a token and one of its experts, sorted by expert.

    Attributes:
        pairs: the pair that stands in each place, as token · k + choice, [N·k].
        tokens: the token of each place, [N·k].
        places: where each token's pairs stand, [N, k].
        counts: pairs of each expert, [X].
    """

    def __init__(self, numbers: Tensor, num_experts: int) -> None:
        """numbers [N, k]"""
        pairs = numbers.flatten()
        self.pairs = pairs.argsort(stable=True)
        self.tokens = self.pairs // numbers.shape[1]
        places = torch.empty_like(self.pairs)
        places[self.pairs] = torch.arange(len(pairs), device=numbers.device)
        self.places = places.view_as(numbers)
        self.counts = torch.bincount(pairs, minlength=num_experts)


class Dispatch(torch.autograd.Function):
    """Tokens [N, D] → a row for each pair, in order, [N·k, D].

    The gradient of a token is the sum of its rows', taken choice by choice: torch's own scatter adds up in any order, so
    that on a GPU no two runs would be the same.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return tokens[order.tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.order.places].sum(dim=1), None


class Combine(torch.autograd.Function):
    """Dispatch's mirror: rows [N·k, D] → the sum of each token's, [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return rows[order.places].sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.order.tokens], None
