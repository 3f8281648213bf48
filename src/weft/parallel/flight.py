"""Flights: rows that travel to other processes while something else is worked out, forward and backward.

An all-to-all in two halves. What is made between `Depart` and `Arrive` in the forward pass is between them in backward
too, for autograd takes what was made last first: `Arrive` sends the gradients off, the gradients of what was made between
are worked out, and `Depart` waits for what has come back. The plain reference is `collectives.AllToAll`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.collectives import ops


@dataclass(eq=False)
class Flight:
    """One tensor's journey: how many rows each process gets and gives, as `collectives.all_to_all` has it.

    Attributes:
        gradients: those on their way back, between the two halves.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    gradients: Tensor | None = None


def travel(
    rows: tuple[Tensor, ...],
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup,
    meanwhile: Callable[[], None],
) -> list[Tensor]:
    """Rows to other processes, all tensors at once; `meanwhile` is done while they are on their way."""
    flights = [Flight(group, sent, received) for _ in rows]
    away = [Depart.apply(x, flight) for x, flight in zip(rows, flights, strict=True)]
    meanwhile()
    return [Arrive.apply(x, flight) for x, flight in zip(away, flights, strict=True)]


class Depart(torch.autograd.Function):
    """Nobody but Arrive may look at what this gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return begin(x, flight.sent, flight.received, flight.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradients, ctx.flight.gradients = ctx.flight.gradients, None
        return end(gradients), None


class Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        # recomputation ends with the last tensor that backward needs; so it does not end with a message under way
        ctx.save_for_backward(x.new_empty(0))
        return end(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.gradients = begin(grad, flight.received, flight.sent, flight.group)
        return grad, None  # in the place of what is under way, and of its size before it left


def begin(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return ops.all_to_all_single(x.contiguous(), received, sent, group.group_name)


def end(x: Tensor) -> Tensor:
    return ops.wait_tensor(x)
