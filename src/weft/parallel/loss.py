"""Cross-entropy of logits whose vocabulary may be cut over the tp axis. The whole logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""Target of a position that has none."""
ROWS = 1024
"""Positions worked on at once, to bound the fp32 copy."""
CPU_LOGITS = 2**19
"""Logits worked on at once on a CPU, so that their fp32 copy stays in its cache: twice as fast (50,257 columns)."""


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
        wanted = ctx.needs_input_grad[0]
        # over a group each part takes two messages: let there be few of them
        rows = ROWS if logits.is_cuda or group is not None else max(1, CPU_LOGITS // logits.shape[-1])
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        losses = [_losses(part, target, first, group, wanted) for part, target in parts]
        if wanted:
            ctx.save_for_backward(logits)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None, None, None


def _losses(logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None, wanted: bool) -> Tensor:
    """Loss of each row, [N], fp32. Where `wanted`, the gradient of their sum takes the place of `logits`, [N, V]."""
    has_target = targets != IGNORED
    columns = targets - first
    here = has_target & (columns >= 0) & (columns < logits.shape[-1])
    columns = columns.masked_fill(~here, 0).unsqueeze(-1)

    peak = logits.amax(dim=-1).float()
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    weights = logits - peak.unsqueeze(-1)  # fp32, as the peak is
    target_logit = weights.gather(-1, columns).squeeze(-1).masked_fill(~here, 0)
    weights.exp_()
    sums = torch.stack((weights.sum(dim=-1), target_logit))
    if group is not None:
        dist.all_reduce(sums, group=group)

    if wanted:
        shares = (has_target / sums[0]).unsqueeze(-1)
        at_target = weights.gather(-1, columns) * shares - here.unsqueeze(-1).float()
        torch.mul(weights, shares, out=logits)
        logits.scatter_(-1, columns, at_target.to(logits.dtype))
    return (sums[0].log() - sums[1]).masked_fill(~has_target, 0)
