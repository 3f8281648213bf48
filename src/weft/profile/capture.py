"""Capture: traces of chosen steps on chosen ranks of a run under way, by torch's own profiler.

A trace is Kineto's JSON, gzipped, as torch writes it. Beside it lies what the trace alone does not say: which group is
which axis, what was held before, how far this machine's clock is off, what the device can do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from weft.profile.clock import clock_offset
from weft.profile.ranges import Ranges, named
from weft.profile.request import FOLDER, MANIFEST, WARM, Request
from weft.whole import write_whole


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08}"


@dataclass
class Capture:
    """What a trainer holds; idle until a request is taken.

    Args:
        run: folder of the run.
        device: of this process.
        ranges: names for the parts of the model and of the step.
        about: the same on every rank, for the manifest; asked for when a trace is written.
        held: bytes that lie in memory from step to step, by what they are; asked for when a trace begins.
        note: tells the user something.
    """

    run: Path
    device: torch.device
    ranges: Ranges
    about: Callable[[], dict[str, Any]]
    held: Callable[[], dict[str, int]]
    note: Callable[[str], None]
    request: Request | None = None
    began_at: int = 0
    _profiler: profile | None = None
    _taken: list[int] = field(default_factory=list)
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def asked(self) -> bool:
        """Whether a request lies there: to be looked at on rank 0, and by all as soon as rank 0 said so."""
        return self.rank == 0 and self.request is None and Request.waiting(self.run)

    def begin(self, done: int) -> None:
        """The start of a run, on all ranks together: what was asked for before it."""
        self.began_at = done
        if self._agree([int(self.asked)])[0]:
            self.take(done)

    def take(self, done: int) -> None:
        """Take the request, on all ranks together. `done`: the last step that is done."""
        values = [0, 0, 0]
        if self.rank == 0:
            try:
                found = Request.take(self.run)
            except ValueError as error:
                self.note(f"{error}: no trace is taken")
            else:
                values = [found.first, found.count, *found.ranks]
        first, count, *ranks = self._agree(values)
        ranks = [rank for rank in ranks if rank < self.world]
        if count < 1 or not ranks:
            return
        earliest = done + 1 if done == self.began_at and first else max(done + 2, self.began_at + WARM + 1)
        self.request = Request(max(first, earliest) if first else earliest, count, tuple(ranks))
        if first and self.request.first != first:
            self.note(f"step {first} is over: the trace begins with step {self.request.first}")

    @property
    def world(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def _agree(self, values: list[int]) -> list[int]:
        """Rank 0's numbers, on every rank."""
        if self.world == 1:
            return values
        length = torch.tensor([len(values)])
        dist.broadcast(length, 0)
        message = torch.zeros(int(length), dtype=torch.int64)
        message[: len(values)] = torch.tensor(values[: int(length)])
        dist.broadcast(message, 0)
        return message.tolist()

    # -- a step -------------------------------------------------------------------------------------------------------

    def before(self, step: int) -> None:
        """Make ready for a step: start the profiler one step early, so that its own start is not in the trace."""
        if self.request is None or step not in (self.request.first - 1, self.request.first):
            return
        if self.rank in self.request.ranks and self._profiler is None:
            self._start()
            if step == self.request.first:
                self._turn()
        if step == self.request.first:
            self._agree([0])  # else who is ready would wait in its first step for those whose profiler still starts

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step. Nothing is done where no trace is taken."""
        if self._profiler is None or self.request is None or step < self.request.first:
            yield
            return
        with named(f"clock:{time.time_ns()}"):
            pass
        with named(f"step:{step}"):
            yield
        self._taken.append(step)

    def after(self, step: int) -> None:
        """Go on after a step; with the last one, write what was taken. All ranks call it."""
        if self.request is None:
            return
        last = step >= self.request.first + self.request.count - 1
        if self._profiler is not None and not last:
            self._turn()
        if last:
            self.finish()

    def finish(self) -> None:
        """Write what was taken so far, on all ranks together."""
        if self.request is None:
            return
        folder, ranks = step_folder(self.run, self.request.first), self.request.ranks
        if self._profiler is not None:
            self._write(folder)
        taken = len(self._taken) if self.rank == ranks[0] else 0
        self.request = None
        self._taken = []
        if self.world > 1:
            self._agree([0])  # everybody has written
            total = torch.tensor([taken])
            dist.broadcast(total, ranks[0])
            taken = int(total)
        if not taken:
            self.note("the run ended before the steps that a trace was asked of")
        elif self.rank == 0:
            self._write_manifest(folder, ranks)
            self.note(f"profiled: weft profile report {folder}")

    # -- the profiler -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        assert self.request is not None
        ahead, error = clock_offset(self.request.ranks)
        self._facts = {"rank": self.rank, "clock_ahead_ns": ahead, "clock_error_ns": error, "held": self.held()}
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells the terminal that it starts, and that it stops
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self.request.count),
            on_trace_ready=lambda _: None,  # written when the time of it is nobody's
            record_shapes=True,
            profile_memory=True,
            acc_events=True,
        )
        self.ranges.begin()
        self._profiler.start()

    def _turn(self) -> None:
        assert self._profiler is not None
        self._profiler.step()

    def _write(self, folder: Path) -> None:
        assert self._profiler is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profiler.stop()
        self.ranges.end()
        folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(folder / f"rank{self.rank}.trace.json.gz"))
        self._profiler = None
        self._facts["steps"] = self._taken
        _write_json(folder / f"rank{self.rank}.json", self._facts)

    def _write_manifest(self, folder: Path, ranks: Sequence[int]) -> None:
        steps = json.loads((folder / f"rank{ranks[0]}.json").read_text(encoding="utf-8"))["steps"]
        _write_json(folder / MANIFEST, {"steps": steps, "ranks": list(ranks), **self.about()})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=1) + "\n")
