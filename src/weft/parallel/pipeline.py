"""The pipeline: one stage works through its micro-batches, handing activations on and gradients back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.mesh import Mesh
from weft.parallel.schedule import Op

Forward = Callable[[int, Tensor | None], Tensor]
"""(micro-batch, hidden states of the stage before or None on the first) → hidden states, or on the last stage the loss."""


class Pipeline:
    """Messages between neighbouring stages. Activations and gradients travel in groups of their own, so that a rank that
    waits for one never holds up the other."""

    def __init__(self, mesh: Mesh, dims: tuple[int, ...], dtype: torch.dtype) -> None:
        self.mesh, self.dims, self.dtype = mesh, dims, dtype
        line = dist.get_process_group_ranks(mesh.group("pp"))
        stage = mesh.index("pp")
        self.before = None if mesh.first_stage else line[stage - 1]
        self.after = None if mesh.last_stage else line[stage + 1]

    def run(self, ops: list[Op], forward: Forward, before_backward: Callable[[bool], None]) -> list[Tensor]:
        """Do `ops` in order; the losses of the last stage come back, one a micro-batch (elsewhere none).

        `before_backward` is told before each backward whether it is the step's last.
        """
        inputs: dict[int, Tensor | None] = {}
        outputs: dict[int, Tensor] = {}
        losses: list[Tensor] = []
        sends: list[tuple[dist.Work, Tensor]] = []
        num_backwards = sum(op.kind == "B" for op in ops)
        message = self._expect(ops[0])
        for op, upcoming in pairwise([*ops, None]):
            assert op is not None
            arrived = message.wait() if message else None
            message = self._expect(upcoming) if upcoming else None
            if op.kind == "F":
                x = arrived.requires_grad_(num_backwards > 0) if arrived is not None else None
                y = forward(op.micro_batch, x)
                if self.after is None:
                    losses.append(y.detach())
                else:
                    sends.append(self._send(y, self.after, self.mesh.group("pp")))
                if num_backwards:
                    inputs[op.micro_batch], outputs[op.micro_batch] = x, y
            else:
                num_backwards -= 1
                before_backward(num_backwards == 0)
                x = inputs.pop(op.micro_batch)
                outputs.pop(op.micro_batch).backward(arrived)
                if x is not None:
                    assert x.grad is not None
                    assert self.before is not None
                    sends.append(self._send(x.grad, self.before, self.mesh.backward))
            sends = [(work, tensor) for work, tensor in sends if not work.is_completed()]
        for work, _ in sends:
            work.wait()
        return losses

    def _expect(self, op: Op) -> _Message | None:
        """Start to receive what `op` needs from a neighbour."""
        source, group = (self.before, self.mesh.group("pp")) if op.kind == "F" else (self.after, self.mesh.backward)
        if source is None:
            return None
        buffer = torch.empty(self.dims, dtype=self.dtype, device=self.mesh.device)
        work = dist.irecv(buffer, source, group=group)
        assert work is not None
        return _Message(work, buffer)

    def _send(self, x: Tensor, to: int, group: dist.ProcessGroup | None) -> tuple[dist.Work, Tensor]:
        """The tensor is held until it has left."""
        data = x.detach().contiguous()
        work = dist.isend(data, to, group=group)
        assert work is not None
        return work, data


class _Message:
    def __init__(self, work: dist.Work, buffer: Tensor) -> None:
        self.work, self.buffer = work, buffer

    def wait(self) -> Tensor:
        self.work.wait()
        return self.buffer
