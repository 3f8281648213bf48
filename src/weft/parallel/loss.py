"""Cross-entropy over a vocabulary that may be cut over the tp axis; from logits, or from what the head takes.

Logits are never gathered, and in the second form never whole: the head's product, the loss and both gradients are worked
out for some positions at a time, as in Liger (Hsu et al., 2024) and Cut Your Losses (Wijmans et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.models.head import Head, aligned, rounded, widened
from weft.models.triton import has_triton

IGNORED = -100
"""Target of a position that has none."""
ROWS = 1024
"""Positions worked on at once, to bound the fp32 copy; with kernels of our own there is none, and all go at once."""
HEAD_ROWS = 1024
"""Positions whose logits exist at once where the loss is worked out from what the head takes."""
HEAD_COLUMNS = 8192
"""Tokens whose gradient of the head exists at once in a low precision, before it is added up in fp32."""
TILE = 4096
"""Columns that a program of the kernels takes at once."""
ROUND = 16
"""Numbers of a row that the kernels read and write at once."""
CPU_LOGITS = 2**19
"""Logits worked on at once on a CPU, so that their fp32 copy stays in its cache: twice as fast (50,257 columns)."""


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum of -log softmax(logits)[target] over every position that has a target, in fp32.

    The gradient overwrites `logits`, which nothing may use afterwards: that saves a tensor as large as the logits, often
    the largest of all.

    Args:
        logits: [..., V] of this process's part of the vocabulary; what lies between their rows (models/head.py) becomes 0.
        targets: [...], token numbers of the whole vocabulary, or IGNORED.
        first: the token number of this process's first column.
        group: the tp axis that the vocabulary is cut over; None: it is whole.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), first, group)


class LossHead(Head):
    """A head that is given the targets too, and gives the summed loss: its logits never exist as a whole."""

    first: int
    group: dist.ProcessGroup | None

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [B, T, D], targets [B, T] → the summed loss; without targets logits, as ever."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy_sum(x, self.weight, targets, self.first, self.group)


def give_loss(head: Head, first: int, group: dist.ProcessGroup | None) -> None:
    """Make a head one that gives the loss. Its vocabulary begins at `first` and is cut over `group`."""
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    head.first, head.group = first, group


def linear_cross_entropy_sum(
    x: Tensor, weight: Tensor, targets: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`cross_entropy_sum(x @ weight.t(), targets)`, some positions at a time.

    Both gradients are worked out at once and wait for backward: as much as `x` and `weight` take, in place of logits.

    Args:
        x: [..., D].
        weight: [V, D], this process's part of the vocabulary; other arguments as there.
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), first, group)


class _CrossEntropy(torch.autograd.Function):
    """The plain way has worked the gradient out when it knows the loss; the kernels do when they know what to multiply
    it with, which saves them a pass over all logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
        wanted, ctx.first = ctx.needs_input_grad[0], first
        if fused(logits):
            losses, peak, total = _fused_losses(logits, targets, first, group)
            if wanted:
                ctx.save_for_backward(logits, targets, peak, total)
            return losses.sum()
        total = _summed_losses(logits, targets, first, group, wanted)
        if wanted:
            ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, *found = ctx.saved_tensors
        if not found:
            return logits.mul_(grad), None, None, None
        targets, peak, total = found
        return _differentiated(logits, targets, peak, total, grad, ctx.first), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The plain reference is `cross_entropy_sum` of `torch.nn.functional.linear`.

    A schedule that puts the products of weights off (zero bubble) gets nothing to put off here: the weight's gradient is
    done in forward, for only there are the logits. It would have to make them again, at a third more work for the head.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        rows, factor = min(HEAD_ROWS, len(x)), rounded(weight)
        buffer = aligned(x, rows, len(weight))
        grad_x = torch.empty_like(x) if wanted else x
        grad_weight = factor.new_zeros(factor.shape, dtype=torch.float32) if wanted else factor
        losses = []
        for part, target, grad in zip(x.split(rows), targets.split(rows), grad_x.split(rows), strict=True):
            logits = buffer[: len(part)]
            wide = widened(logits, len(factor))
            torch.mm(part, factor.t(), out=wide)
            losses.append(_summed_losses(logits, target, first, group, wanted))
            if wanted:  # the logits are their own gradient now
                torch.mm(wide, factor, out=grad)
                _add_product(grad_weight, wide, part)
        if wanted:
            ctx.save_for_backward(grad_x, grad_weight[: len(weight)].to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None, None


def _add_product(total: Tensor, logits: Tensor, x: Tensor) -> None:
    """total [V, D] += logits.t() @ x. In a low precision each product is rounded, but their sum stays fp32."""
    if x.dtype == total.dtype:
        total.addmm_(logits.t(), x)
        return
    for part, columns in zip(total.split(HEAD_COLUMNS), logits.split(HEAD_COLUMNS, dim=1), strict=True):
        part.add_(columns.t() @ x)


def _summed_losses(
    logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None, wanted: bool
) -> Tensor:
    """Loss of all rows of logits [N, V], which are overwritten where `wanted`, in parts of a size to work on."""
    if fused(logits):
        losses, peak, total = _fused_losses(logits, targets, first, group)
        if wanted:
            _differentiated(logits, targets, peak, total, torch.ones_like(peak[0]), first)
        return losses.sum()
    # over a group each part takes two messages: let there be few of them
    rows = ROWS if logits.is_cuda or group is not None else max(1, CPU_LOGITS // logits.shape[-1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([_losses(part, target, first, group, wanted) for part, target in parts]).sum()


def fused(logits: Tensor) -> bool:
    """Whether the kernels of loss_kernels.py do it."""
    return logits.is_cuda and logits.stride(-1) == 1 and len(logits) > 0 and has_triton()


def _fused_losses(
    logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_losses`, its plain reference, in a kernel: numbers are fp32 on the way, and there is no fp32 copy.

    Returns:
        The loss of each row, and with what `_differentiated` needs: the row's largest logit, and its sum of exponentials.
    """
    found = logits.new_empty(3, len(logits), dtype=torch.float32)
    _look(logits, targets, found, first)
    peak, sums = found[0], found[1:]
    if group is not None:
        peak = peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        shift = found[0] - peak
        not_here = (targets < first) | (targets >= first + logits.shape[-1]) | (targets == IGNORED)
        sums[0] *= shift.exp()
        sums[1] += shift.masked_fill(not_here, 0)
        dist.all_reduce(sums, group=group)
    return (sums[0].log() - sums[1]).masked_fill(targets == IGNORED, 0), peak, sums[0]


def _look(logits: Tensor, targets: Tensor, found: Tensor, first: int) -> None:
    from weft.parallel.loss_kernels import look

    (rows, columns), tile = logits.shape, _tile(logits)
    with torch.cuda.device_of(logits):
        look[rows,](
            logits, targets, found, logits.stride(0), columns, _wide(logits), first, rows, IGNORED=IGNORED, TILE=tile,
            num_warps=8,
        )  # fmt: skip


def _differentiated(logits: Tensor, targets: Tensor, peak: Tensor, total: Tensor, scale: Tensor, first: int) -> Tensor:
    """`scale` · the gradient of the losses, in place of the logits."""
    from weft.parallel.loss_kernels import differentiate

    (rows, _), tile, wide = logits.shape, _tile(logits), _wide(logits)
    with torch.cuda.device_of(logits):
        differentiate[rows, -(-wide // tile)](
            logits, targets, peak, total, scale, logits.stride(0), logits.shape[1], wide, first, IGNORED=IGNORED,
            TILE=tile, num_warps=8,
        )  # fmt: skip
    torch.autograd.graph.increment_version(logits)
    return logits


def _wide(logits: Tensor) -> int:
    """Columns up to a round number, as far as a row reaches."""
    return min(-(-logits.shape[1] // ROUND) * ROUND, max(logits.stride(0), logits.shape[1]))


def _tile(logits: Tensor) -> int:
    return min(TILE, 1 << (logits.shape[-1] - 1).bit_length())


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
