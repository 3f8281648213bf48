"""Several processes serve one model: the first schedules and tells the others what to compute.

They stand in `pp` stages, each of a run of the model's blocks, of `tp` processes, each of a share of every matrix and of
the keys of its heads. What a step computes is one short row of integers, sent before it; the only other messages are those
of tensor parallelism, hidden states from stage to stage, and the logits' way to the first process.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from weft.models.cuts import even_split
from weft.serve.config import EngineConfig
from weft.serve.cut.group import Meeting, meet, part
from weft.serve.cut.workers import SILENT_SECONDS, Workers
from weft.serve.steps.device import pick_device

START_SECONDS = 600


class Order(IntEnum):
    """What the first process has the others do."""

    END = 0
    RUN = 1
    EMBED = 2


class Ranks:
    """The processes of a model, stage by stage, as each of them sees them.

    Args:
        group: all of them.
        tp_group: those of this process's stage.
        workers: those that the first began.
        meeting: that the first called; ends with them.

    Attributes:
        stage: this process's.
    """

    def __init__(
        self, group: dist.ProcessGroup, tp_group: dist.ProcessGroup, workers: Workers | None = None,
        meeting: Meeting | None = None,
    ) -> None:  # fmt: skip
        self.group, self.tp_group, self.meeting = group, tp_group, meeting
        self.workers = workers or Workers()
        self.index, self.size, self.tp = group.rank(), group.size(), tp_group.size()
        self.pp = self.size // self.tp
        self.stage = self.index // self.tp
        self._over = False

    def blocks(self, num_layers: int) -> range:
        """Of the model, those of this process's stage."""
        return range(*even_split(num_layers, self.pp, self.stage))

    def send(self, order: Order, row: Tensor) -> None:
        """Tell the others what comes next.

        Raises:
            RankDiedError: there is one less of them.
        """
        self.workers.check()
        self.group.broadcast(torch.tensor([order, len(row)]), root=0).wait()
        self.group.broadcast(row, root=0).wait()

    def receive(self) -> tuple[Order, Tensor]:
        """What the first process says."""
        head = torch.zeros(2, dtype=torch.long)
        self.group.broadcast(head, root=0).wait()
        order, length = head.tolist()
        row = torch.empty(length, dtype=torch.long)
        if length:
            self.group.broadcast(row, root=0).wait()
        return Order(order), row

    def take_over(self, like: Tensor) -> Tensor:
        """What the stage before computed, of the size and dtype of `like`."""
        return self._receive(like, self.index - self.tp)

    def hand_on(self, x: Tensor) -> None:
        """To the next stage."""
        self._send(x, self.index + self.tp)

    def gather(self, logits: Tensor, vocab: int) -> Tensor:
        """In the last stage: shares of the vocabulary [W, V/n] → [W, V] on its first process, which tells them the first
        of all; elsewhere the share comes back."""
        sizes = [stop - start for start, stop in (even_split(vocab, self.tp, index) for index in range(self.tp))]
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[1])).contiguous()
        first = self.tp_group.rank() == 0
        parts = [torch.empty_like(padded) for _ in sizes] if first else []
        self.tp_group.gather(parts, padded, root=0).wait()
        if not first:
            return logits
        return self.tell_first(torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1))

    def tell_first(self, x: Tensor) -> Tensor:
        """From the first process of the last stage to the first of all, where that is another one."""
        if self.index and self.index == self.size - self.tp:
            self._send(x, 0)
        return x

    def gathered(self, like: Tensor) -> Tensor:
        """What it told, on the first process where that is not of the last stage."""
        return self._receive(like, self.size - self.tp)

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        found = torch.tensor([number])
        self.group.allreduce(found, dist.ReduceOp.MIN).wait()
        return int(found.item())

    def close(self) -> None:
        """Send the others home; from the first process."""
        if any(process.poll() is not None for process in self.workers.processes):
            return self.kill()
        try:
            told = self.group.broadcast(torch.tensor([Order.END, 0]), root=0)
            told.wait(timedelta(seconds=SILENT_SECONDS))
        except RuntimeError:  # one has ended meanwhile, or stands still
            return self.kill()
        self.workers.wait()
        return self.leave()

    def kill(self) -> None:
        """End the others, whatever they are doing; this process no longer waits for any of them."""
        self.workers.kill()
        self.leave()

    def leave(self) -> None:
        """For this process it is over; said twice, it is no news."""
        if not self._over:
            self._over = True
            for group in {self.group, self.tp_group}:
                part(group)
            if self.meeting is not None:
                self.meeting.close()

    def _send(self, x: Tensor, to: int) -> None:
        self.group.send([x.contiguous()], to, 0).wait()

    def _receive(self, like: Tensor, sender: int) -> Tensor:
        self.group.recv([like], sender, 0).wait()
        return like


def start_ranks(folder: Path, config: EngineConfig) -> Ranks:
    """Begin `config.tp` · `config.pp` - 1 processes that follow this one.

    Raises:
        ValueError: there are fewer GPUs.
    """
    rank_device(config, config.world - 1)
    meeting = Meeting()
    codes = [
        "from weft.serve.cut.workers import start_beating; start_beating(beat); "
        "from weft.serve.config import EngineConfig; from weft.serve.cut.follow import main; "
        f"main({str(folder)!r}, {str(meeting.store)!r}, {index}, {config!r})"
        for index in range(1, config.world)
    ]
    workers = Workers(codes, {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // config.world)), **os.environ})
    try:
        return join(meeting.store, 0, config, workers, meeting)
    except BaseException:
        workers.kill()
        meeting.close()
        raise


def join(
    store: Path, index: int, config: EngineConfig, workers: Workers | None = None, meeting: Meeting | None = None
) -> Ranks:
    """Become one of the processes that meet at this file. Its name is theirs: no others have it."""
    device = rank_device(config, index)
    files = dist.FileStore(str(store), config.world)  # type: ignore[attr-defined]
    files.set_timeout(timedelta(seconds=START_SECONDS))
    files.set(f"here-{index}", "")
    if workers is not None:
        expect(files, config.world, workers)
    group = meet(files, store.name, index, config.world, device)
    if config.pp == 1:
        return Ranks(group, group, workers, meeting)
    stage, place = divmod(index, config.tp)
    return Ranks(group, meet(files, f"{store.name}-{stage}", place, config.tp, device), workers, meeting)


def expect(files: Store, world: int, workers: Workers) -> None:
    """Wait until all are there; to meet whoever is gone would take much longer.

    Raises:
        RankDiedError: one has ended.
        TimeoutError: one does not come.
    """
    end = time.monotonic() + START_SECONDS
    while not files.check([f"here-{index}" for index in range(world)]):
        workers.check()
        if time.monotonic() > end:
            raise TimeoutError(f"not all of {world} processes have begun within {START_SECONDS} s")
        time.sleep(0.02)


def rank_device(config: EngineConfig, index: int) -> torch.device:
    """Each process has a GPU of its own.

    Raises:
        ValueError: there are fewer.
    """
    device = pick_device(config.device)
    if device.type == "cuda" and index >= (count := torch.cuda.device_count()):
        raise ValueError(f"tp · pp is {config.world}, a GPU for each process, and there are {count}: choose less")
    return torch.device("cuda", index) if device.type == "cuda" else device
