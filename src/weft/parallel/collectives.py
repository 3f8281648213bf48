"""The differentiable collectives of tensor parallelism (Shoeybi et al., 2019; Korthikanti et al., 2022).

Each is the other's mirror in backward: copy ↔ sum, gather ↔ scatter. Activations are [B, T, ...]; the sequence is dim 1.
"""

from __future__ import annotations

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


def all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...]: part i goes to process i; what comes from process i is part i."""
    equal = [1] * group.size()
    return ops.wait_tensor(ops.all_to_all_single(parts.contiguous(), equal, equal, group.group_name))


class CopyToAxis(torch.autograd.Function):
    """The same on every process of the axis; gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class SumOverAxis(torch.autograd.Function):
    """Shares add up; the gradient is the same on every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class GatherSequence(torch.autograd.Function):
    """Parts of the sequence join; gradients add up and each process keeps its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grad, ctx.group), None


class ScatterSequence(torch.autograd.Function):
    """Shares add up and each process keeps its part of the sequence; gradients join."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad, ctx.group), None
