"""The output matrix: hidden states to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Numbers that a row of logits is made a multiple of, in memory."""


class Head(nn.Linear):
    """A linear layer without bias, whose result lies in rows of a round length where the vocabulary has none.

    Matrix products are slow on rows that begin anywhere, forward and backward: with GPT-2's 50,257 tokens this one takes
    40 % longer in fp32 on a CPU than with 50,304, and tensor cores want multiples of 8. The weights stay as they are.
    """

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__(hidden, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, V]; its rows may be farther apart than V."""
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not trained or self.weight.shape[0] % ALIGNED == 0:
            return super().forward(x)
        return _AlignedLinear.apply(x, self.weight)


def aligned(like: Tensor, rows: tuple[int, ...], columns: int) -> Tensor:
    """[*rows, columns], in rows of a round length. What lies between them is 0: a CPU's tiles (AMX), of rows of odd
    length in bf16, multiply the number behind each by 0, and where that is no number nothing is (PyTorch 2.13)."""
    whole = like.new_empty(*rows, -(-columns // ALIGNED) * ALIGNED)
    whole[..., columns:].zero_()
    return whole[..., :columns]


class _AlignedLinear(torch.autograd.Function):
    """The plain reference is `torch.nn.functional.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # as data, for the loss could not overwrite a view of a rounder tensor
        logits = aligned(x, x.shape[:-1], len(weight)).data
        torch.mm(x.flatten(0, -2), weight.t(), out=logits.flatten(0, -2))
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (rows @ weight).view_as(x), rows.t() @ x.flatten(0, -2)
