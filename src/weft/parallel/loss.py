"""Cross-entropy of logits whose vocabulary may be cut over the tp axis. The whole logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""Target of a position that has none."""
ROWS = 1024
"""Positions worked on at once, to bound the fp32 copies."""


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum of -log softmax(logits)[target] over every position that has a target, in fp32.

    The gradient is worked out at once and overwrites `logits`, which nothing may use afterwards: that saves a tensor as
    large as the logits, often the largest of all.

    Args:
        logits: [..., V] of this process's part of the vocabulary.
        targets: [...], token numbers of the whole vocabulary, or IGNORED.
        first: the token number of this process's first column.
        group: the tp axis that the vocabulary is cut over; None: it is whole.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), first, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        for part, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
            losses, gradient = _losses(part, target, first, group)
            total += losses.sum()
            if wanted:
                part.copy_(gradient)
        if wanted:
            ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None, None, None


def _losses(logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Loss of each row, [N], and the gradient of their sum, [N, V], both fp32."""
    has_target = targets != IGNORED
    columns = targets - first
    here = has_target & (columns >= 0) & (columns < logits.shape[-1])
    columns = columns.masked_fill(~here, 0).unsqueeze(-1)

    peak = logits.amax(dim=-1).float()
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    shifted = logits.float() - peak.unsqueeze(-1)
    target_logit = shifted.gather(-1, columns).squeeze(-1).masked_fill(~here, 0)
    weights = shifted.exp_()
    sums = torch.stack((weights.sum(dim=-1), target_logit))
    if group is not None:
        dist.all_reduce(sums, group=group)

    losses = (sums[0].log() - sums[1]).masked_fill(~has_target, 0)
    gradient = weights.mul_((has_target / sums[0]).unsqueeze(-1))
    gradient.scatter_add_(-1, columns, -here.float().unsqueeze(-1))
    return losses, gradient
