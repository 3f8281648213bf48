"""Several processes serve one model: the first schedules and tells the others what to compute.

They stand in `pp` stages, each of a run of the model's blocks, of `tp` processes, each of a share of every matrix and of
the keys of its heads. What a step computes is one short row of integers, sent before it; the only other messages are those
of tensor parallelism, hidden states from stage to stage, and the logits' way to the first process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from weft.models.cuts import even_split
from weft.serve.batch import Batch
from weft.serve.config import EngineConfig
from weft.serve.device import pick_device, pick_dtype

if TYPE_CHECKING:
    from weft.serve.runner import Runner

FOREVER = timedelta(days=3650)
"""An engine may be idle for long; a process that dies closes its connections, which is noticed at once."""

START_SECONDS = 600


class RankDiedError(RuntimeError):
    """One of the processes that serve a model has ended."""


class Ranks:
    """The processes of a model, stage by stage, as each of them sees them.

    Args:
        group: all of them. Made in each at the same time.
        processes: those that the first began.
        folder: where they met; goes with them.

    Attributes:
        stage, tp_group: this process's.
    """

    def __init__(
        self, group: dist.ProcessGroup, processes: Sequence[subprocess.Popen[bytes]] = (), pp: int = 1,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:  # fmt: skip
        self.group, self.processes, self.pp, self.folder = group, processes, pp, folder
        self.index, self.size = group.rank(), group.size()
        self.tp = self.size // pp
        self.stage = self.index // self.tp
        self.tp_group = group
        if pp > 1:
            stages = [list(range(first, first + self.tp)) for first in range(0, self.size, self.tp)]
            self.tp_group = [dist.new_group(ranks, timeout=FOREVER) for ranks in stages][self.stage]

    def blocks(self, num_layers: int) -> range:
        """Of the model, those of this process's stage."""
        return range(*even_split(num_layers, self.pp, self.stage))

    def send(self, batch: Batch) -> None:
        """Tell the others what comes next."""
        self.check()
        packed = batch.pack()
        dist.broadcast(torch.tensor([len(packed)]), 0, self.group)
        dist.broadcast(packed, 0, self.group)

    def receive(self) -> Batch | None:
        """What the first process says; None: it is over."""
        size = torch.zeros(1, dtype=torch.long)
        dist.broadcast(size, 0, self.group)
        if not size.item():
            return None
        packed = torch.empty(int(size.item()), dtype=torch.long)
        dist.broadcast(packed, 0, self.group)
        return Batch.unpack(packed)

    def take_over(self, like: Tensor) -> Tensor:
        """What the stage before computed, of the size and dtype of `like`."""
        dist.recv(like, self.index - self.tp, self.group)
        return like

    def hand_on(self, x: Tensor) -> None:
        """To the next stage."""
        dist.send(x.contiguous(), self.index + self.tp, self.group)

    def gather(self, logits: Tensor, vocab: int) -> Tensor:
        """In the last stage: shares of the vocabulary [W, V/n] → [W, V] on its first process, which tells them the first
        of all; elsewhere the share comes back."""
        sizes = [stop - start for start, stop in (even_split(vocab, self.tp, index) for index in range(self.tp))]
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[1])).contiguous()
        first = self.stage * self.tp
        parts = [torch.empty_like(padded) for _ in sizes] if self.index == first else None
        dist.gather(padded, parts, dst=first, group=self.tp_group)
        if parts is None:
            return logits
        whole = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
        if first:
            dist.send(whole, 0, self.group)
        return whole

    def gathered(self, like: Tensor) -> Tensor:
        """The same, on the first process where it is not of the last stage."""
        dist.recv(like, self.size - self.tp, self.group)
        return like

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        found = torch.tensor([number])
        dist.all_reduce(found, dist.ReduceOp.MIN, self.group)
        return int(found.item())

    def check(self) -> None:
        """
        Raises:
            RankDiedError: a process has ended that should not have.
        """
        for index, process in enumerate(self.processes, start=1):
            if process.poll() is not None:
                raise RankDiedError(f"process {index} of {self.size} ended with exit code {process.returncode}")

    def close(self) -> None:
        """Send the others home; from the first process."""
        if any(process.poll() is not None for process in self.processes):
            return self.kill()
        dist.broadcast(torch.zeros(1, dtype=torch.long), 0, self.group)
        for process in self.processes:
            process.wait()
        if self.processes:
            self._part()
        return None

    def kill(self) -> None:
        """End the others, whatever they are doing."""
        for process in self.processes:
            process.kill()
            process.wait()
        self._part()

    def _part(self) -> None:
        dist.destroy_process_group()
        if self.folder is not None:
            self.folder.cleanup()


def start_ranks(folder: Path, config: EngineConfig) -> Ranks:
    """Begin `config.tp` · `config.pp` - 1 processes that follow this one.

    Raises:
        ValueError: this process belongs to a group already: it can serve one model that is cut, or be of a training run.
    """
    if dist.is_initialized():
        raise ValueError("tp, pp: this process serves a cut model already; close that engine, or use another process")
    meeting = tempfile.TemporaryDirectory(prefix="weft-serve-")
    store = Path(meeting.name) / "store"
    processes = []
    for index in range(1, config.world):
        code = f"from weft.serve.ranks import main; main({str(folder)!r}, {str(store)!r}, {index}, {config!r})"
        code = f"from weft.serve.config import EngineConfig; {code}"
        env = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // config.world)), **os.environ}
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL))
    try:
        return Ranks(join(store, 0, config), processes, config.pp, meeting)
    except BaseException:
        for process in processes:
            process.kill()
        meeting.cleanup()
        raise


def join(store: Path, index: int, config: EngineConfig) -> dist.ProcessGroup:
    """Become one of the processes."""
    device = rank_device(config, index)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    files = dist.FileStore(str(store), config.world)  # type: ignore[attr-defined]
    files.set_timeout(timedelta(seconds=START_SECONDS))
    dist.init_process_group(backend, store=files, rank=index, world_size=config.world, timeout=FOREVER)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def rank_device(config: EngineConfig, index: int) -> torch.device:
    """Each process has a GPU of its own."""
    device = pick_device(config.device)
    return torch.device("cuda", index) if device.type == "cuda" else device


def main(folder: str, store: str, index: int, config: EngineConfig) -> None:
    """A process that is not the first: compute what that says, until it says that it is over, or is gone."""
    from weft.serve.runner import Runner, num_blocks
    from weft.serve.share import load_share

    ranks = Ranks(join(Path(store), index, config), pp=config.pp)
    device = rank_device(config, index)
    model = load_share(Path(folder), ranks, device, pick_dtype(config.dtype, device))
    max_context = min(config.max_context or model.shape.max_seq, model.shape.max_seq)
    blocks = ranks.least(num_blocks(model, config, max_context))
    follow(Runner(model, blocks, config, ranks), ranks)
    dist.destroy_process_group()


def follow(runner: Runner, ranks: Ranks) -> None:
    """Compute what the first process says, until it says that it is over."""
    while (batch := ranks.receive()) is not None:
        for _ in runner.run(batch):
            pass
