"""How long a piece of work takes here, while the other processes of the run do the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLD = 24 * 2**20
"""Bytes that are gone through before memory is met again, so that it comes from where a training step finds it: a step
touches far more than a CPU's cache holds."""
MOST_COPIES = 16
REPETITION = 0.01
"""Seconds of a repetition, as far as `Clock.most` calls fill them; a launch takes a thousandth of that."""
QUIET = 0.2
"""Of all repetitions, the share below the one that counts: others that use the machine only ever make work slower."""


class Clock:
    """Times work on one device."""

    def __init__(self, device: torch.device, repetitions: int = 5, longest: float = 0.1) -> None:
        """
        Args:
            longest: seconds that a work may take, and after which it is not repeated.
        """
        self.device, self.repetitions, self.longest = device, repetitions, longest
        self.most = 1 if device.type == "cpu" else 20
        """Calls of one repetition at most: a GPU is launched ahead of, so that what a short call takes only many show."""

    def copies(self, size: float) -> int:
        """Of a work on `size` bytes, how many there should be, each with memory of its own."""
        return int(min(MOST_COPIES, max(1, COLD // max(1, size))))

    def time(
        self, works: Sequence[Callable[[], Any]], *, shared: bool = False, before: Callable[[], Any] | None = None
    ) -> list[float]:
        """Seconds of each repetition; the works take turns.

        Args:
            shared: it is done with other processes, as often in each of them.
            before: done before each, and not timed; on a GPU, which goes on by itself, it is left out.
        """
        self.together()
        works[0]()
        self.wait()
        calls = self.most if shared else self.calls(works[0])
        found: list[float] = []
        began = time.perf_counter()
        for turn in range(self.repetitions):
            if before is not None and self.device.type == "cpu":
                before()
            start = time.perf_counter()
            for call in range(calls):
                works[(turn * calls + call + 1) % len(works)]()
            self.wait()
            found.append((time.perf_counter() - start) / calls)
            if not shared and turn > 0 and time.perf_counter() - began > self.longest:
                break
        return found

    def both_ways(self, works: Sequence[Callable[[], tuple[Tensor, list[Tensor]]]]) -> tuple[list[float], list[float]]:
        """Seconds of each forward and of each backward pass. A work gives its result, and what that has a gradient for."""
        self.together()
        y, leaves = works[0]()
        grad = torch.rand_like(y)
        torch.autograd.grad(y, leaves, grad)
        self.wait()
        calls = self.calls(works[0])
        ways: tuple[list[float], list[float]] = ([], [])
        began = time.perf_counter()
        for turn in range(self.repetitions):
            self.wait()
            start = time.perf_counter()
            kept = [works[(turn + call + 1) % len(works)]() for call in range(calls)]
            self.wait()
            middle = time.perf_counter()
            for y, leaves in kept:
                torch.autograd.grad(y, leaves, grad)
            self.wait()
            ways[0].append((middle - start) / calls)
            ways[1].append((time.perf_counter() - middle) / calls)
            if turn > 0 and time.perf_counter() - began > self.longest:
                break
        return ways

    def calls(self, work: Callable[[], object]) -> int:
        """Of a work that is warm, how many a repetition has: less than `most` of one that fills the GPU alone."""
        if self.most == 1:
            return 1
        start = time.perf_counter()
        work()
        self.wait()
        return max(1, min(self.most, int(REPETITION / (time.perf_counter() - start))))

    def together(self) -> None:
        """All processes begin at once: what they take from each other is part of the machine."""
        if dist.get_world_size() > 1:
            dist.barrier()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def quiet(times: Sequence[float]) -> float:
    """Of repetitions, what one takes while nobody else uses the machine, as near as they tell."""
    return sorted(times)[int(QUIET * (len(times) - 1))]
