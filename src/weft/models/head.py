"""The output matrix: hidden states to logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 64
"""Numbers that a row of logits is made a multiple of, in memory."""
ROUNDED, VECTOR = ("cuda",), 8
"""Devices where what lies behind a row is multiplied too, unless it has a multiple of so many numbers."""


class Head(nn.Linear):
    """A linear layer without bias, whose result lies in rows of a round length where the vocabulary has none.

    Matrix products are slow on rows that begin anywhere, forward and backward: with GPT-2's 50,257 tokens this one takes
    40 % longer in fp32 on a CPU than with 50,304. A GPU also wants the number of columns round, and multiplies by some
    rows of zeros too (else the three products of 32,768 tokens in bf16 take an H200 51 ms). The weights stay as they are.
    """

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__(hidden, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, V]; its rows may be farther apart than V."""
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not trained or self.weight.shape[0] % ALIGNED == 0:
            return super().forward(x)
        return _AlignedLinear.apply(x, self.weight)


def aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns], in rows of a round length. What lies between them is 0: a CPU's tiles (AMX), of rows of odd
    length in bf16, multiply the number behind each by 0, and where that is no number nothing is (PyTorch 2.13)."""
    whole = like.new_empty(rows, round_up(columns))
    whole[:, columns:].zero_()
    return whole[:, :columns]


def rounded(weight: Tensor) -> Tensor:
    """What `aligned` logits are a product with: on a GPU a copy of [V, D] with rows of zeros up to a round number."""
    columns = len(weight)
    if weight.device.type not in ROUNDED or columns % VECTOR == 0:
        return weight
    return F.pad(weight, (0, 0, 0, round_up(columns) - columns))


def widened(logits: Tensor, columns: int) -> Tensor:
    """`aligned` logits [N, V] with what lies behind each row, up to so many columns."""
    return logits.as_strided((len(logits), columns), logits.stride())


def round_up(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


class _AlignedLinear(torch.autograd.Function):
    """The plain reference is `torch.nn.functional.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        factor, rows = rounded(weight), x.flatten(0, -2)
        logits = aligned(x, len(rows), len(weight))
        torch.mm(rows, factor.t(), out=widened(logits, len(factor)))
        ctx.place = logits.untyped_storage() if factor is not weight else None
        # as data, for the loss could not overwrite a view of a rounder tensor
        return logits.view(*x.shape[:-1], len(weight)).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        factor, rows = rounded(weight), grad.flatten(0, -2)
        if more := len(factor) - len(weight):
            # a loss that overwrites the logits leaves zeros behind them
            ours = grad.untyped_storage()._cdata == ctx.place._cdata
            rows = widened(rows, len(factor)) if ours else F.pad(rows, (0, more))
        ctx.place = None
        return (rows @ factor).view_as(x), (rows.t() @ x.flatten(0, -2))[: len(weight)]
