"""The differentiable collectives of tensor and expert parallelism (Shoeybi et al., 2019; Korthikanti et al., 2022).

Each is the other's mirror in backward: copy ↔ sum, gather ↔ scatter, take ↔ join. Activations are [B, T, ...]; the
sequence is dim 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ops = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T/n, ...] of each process → [B, T, ...]."""
    ways = group.size()
    parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), ways, group.group_name))
    return parts.unflatten(0, (ways, x.shape[0])).transpose(0, 1).flatten(1, 2)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, ...] → the sum over processes of this one's [B, T/n, ...]."""
    ways = group.size()
    parts = x.unflatten(1, (ways, x.shape[1] // ways)).transpose(0, 1).flatten(0, 1).contiguous()
    return ops.wait_tensor(ops.reduce_scatter_tensor(parts, "sum", ways, group.group_name))


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Rows to other processes: the first `sent[0]` to the first, and so on; `received[0]` come first, from it. One for
    each where not said."""
    if group.size() == 1:
        return x.view_as(x)
    equal = [1] * group.size()
    return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), received or equal, sent or equal, group.group_name))


def all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] of each process → [n·N, ...]."""
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n·N, ...] → the sum over processes of this one's [N, ...]."""
    return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


def own_part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, ...] → this process's [B, T/n, ...]."""
    return x.chunk(group.size(), dim=1)[group.rank()].contiguous()


def alike(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Nothing to do: it is the same on every process."""
    return x.view_as(x)


Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


def differentiable(there: Collective, back: Collective) -> type[torch.autograd.Function]:
    """`there` in the forward pass, and for the gradient `back`."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
            ctx.group = group
            return there(x, group)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return back(grad, ctx.group), None

    return Function


CopyToAxis = differentiable(alike, all_reduce)
"""The same on every process of the axis; gradients add up."""
SumOverAxis = differentiable(all_reduce, alike)
"""Shares add up; the gradient is the same on every process."""
GatherSequence = differentiable(all_gather_sequence, reduce_scatter_sequence)
"""Parts of the sequence join; gradients add up and each process keeps its part."""
ScatterSequence = differentiable(reduce_scatter_sequence, all_gather_sequence)
"""Shares add up and each process keeps its part of the sequence; gradients join."""
TakeSequence = differentiable(own_part, all_gather_sequence)
"""Of a whole that is the same on every process, each keeps its part of the sequence; gradients join."""
JoinSequence = differentiable(all_gather_sequence, own_part)
"""Parts of the sequence join; the gradient is the same on every process, and each keeps its part of it."""
GatherRows = differentiable(all_gather_rows, reduce_scatter_rows)
"""Rows of all processes join; gradients add up and each keeps those of its own."""
ScatterRows = differentiable(reduce_scatter_rows, all_gather_rows)
"""Shares add up and each process keeps its own rows; gradients join."""


class AllToAll(torch.autograd.Function):
    """Rows to other processes: the first `sent[0]` to the first, and so on; `received[0]` come first, from it. Gradients
    go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.group, ctx.received, ctx.sent), None, None, None
