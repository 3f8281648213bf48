"""The pipeline: a process works through its row of a schedule, handing activations on and gradients back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.mesh import Mesh
from weft.schedules.table import Op, Schedule


class Work(Protocol):
    """What the operations of one stage do. `last`: no later one adds to the gradients of this stage in this step."""

    def forward(self, stage: int, micro_batch: int, x: Tensor | None) -> Tensor:
        """Hidden states of the stage before (None: the first stage) → hidden states, or on the last stage the loss."""

    def backward(self, stage: int, micro_batch: int, y: Tensor, grad: Tensor | None, put_off: bool, last: bool) -> None:
        """Gradients from that of what `forward` gave (None: it is the loss); those of weights may be put off."""

    def weights(self, stage: int, micro_batch: int, last: bool) -> None:
        """The gradients of weights that were put off."""


class Pipeline:
    """Messages between stages. What stays on the process is handed over as it is.

    Nobody waits to send. A process takes in another's messages in the order in which that one makes them, whatever they
    are for, so the two always agree; what comes before its time is kept.
    """

    def __init__(self, mesh: Mesh, dims: tuple[int, ...], dtype: torch.dtype, schedule: Schedule) -> None:
        self.mesh, self.dims, self.dtype, self.schedule = mesh, dims, dtype, schedule
        self.rank = mesh.index("pp")
        self.line = dist.get_process_group_ranks(mesh.group("pp"))
        self.order = schedule.orders[self.rank]
        self.lanes: dict[int, Iterator[Op]] = {rank: iter(ops) for rank, ops in incoming(schedule, self.rank).items()}
        self.upcoming = (source for op in self.order if (source := self._remote_source(op)) is not None)
        self.arriving: dict[Op, tuple[dist.Work, Tensor]] = {}
        self.here: dict[Op, Tensor] = {}
        self.sends: list[tuple[dist.Work, Tensor]] = []

    def run(self, work: Work) -> list[Tensor]:
        """Do this process's operations; the losses of the last stage come back, one a micro-batch (elsewhere none)."""
        inputs: dict[tuple[int, int], Tensor | None] = {}
        outputs: dict[tuple[int, int], Tensor] = {}
        losses: list[Tensor] = []
        finals = {op.stage: op for op in self.order if op.kind != "F"}  # the last of each stage stays
        self._expect_next()
        for op in self.order:
            kind, stage, index = op
            arrived = self._take(op)
            if kind == "F":
                x = arrived.requires_grad_(bool(finals)) if arrived is not None else None
                y = work.forward(stage, index, x)
                if stage == self.schedule.num_stages - 1:
                    losses.append(y.detach())
                else:
                    self._give(op, y.detach())
                if finals:
                    inputs[stage, index], outputs[stage, index] = x, y
            elif kind == "B":
                x, y = inputs.pop((stage, index)), outputs.pop((stage, index))
                work.backward(stage, index, y, arrived, (stage, index) in self.schedule.put_off, op == finals[stage])
                if x is not None:
                    assert x.grad is not None
                    self._give(op, x.grad)
            else:
                work.weights(stage, index, op == finals[stage])
            self.sends = [(send, tensor) for send, tensor in self.sends if not send.is_completed()]
        for send, _ in self.sends:
            send.wait()
        return losses

    def _take(self, op: Op) -> Tensor | None:
        """What an operation works on, once it is here. The next message is asked for at once."""
        source = self.schedule.source(op)
        if source is None:
            return None
        if source in self.here:
            return self.here.pop(source)
        message, buffer = self.arriving.pop(source)
        message.wait()
        self._expect_next()
        return buffer

    def _expect_next(self) -> None:
        """Start to receive the next message that will be needed, and what its sender sends before it."""
        source = next(self.upcoming, None)
        if source is None or source in self.arriving:
            return
        rank = self.schedule.place[source.stage]
        for op in self.lanes[rank]:
            buffer = torch.empty(self.dims, dtype=self.dtype, device=self.mesh.device)
            message = dist.irecv(buffer, self.line[rank], group=self._group(rank, self.rank))
            assert message is not None
            self.arriving[op] = message, buffer
            if op == source:
                return

    def _give(self, op: Op, result: Tensor) -> None:
        """Hand a result to the process that works on it. What is sent is held until it has left."""
        rank = self.schedule.result_to(op)
        assert rank is not None
        if rank == self.rank:
            self.here[op] = result
            return
        result = result.contiguous()
        send = dist.isend(result, self.line[rank], group=self._group(self.rank, rank))
        assert send is not None
        self.sends.append((send, result))

    def _remote_source(self, op: Op) -> Op | None:
        source = self.schedule.source(op)
        return source if source is not None and self.schedule.place[source.stage] != self.rank else None

    def _group(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self.mesh.group("pp") if source < target else self.mesh.upward


@lru_cache(maxsize=32)
def incoming(schedule: Schedule, rank: int) -> dict[int, list[Op]]:
    """Other process → those of its operations whose results come here, in the order in which it does them."""
    lanes = {
        other: [op for op in order if schedule.result_to(op) == rank] for other, order in enumerate(schedule.orders)
    }
    return {other: ops for other, ops in lanes.items() if ops and other != rank}
