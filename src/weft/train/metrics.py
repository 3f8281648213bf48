"""What is known about a step, and the meter that knows it."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from weft.config.tree import Config
from weft.parallel.balance import Routing
from weft.train.hardware import Peak

Wait = Literal["data", "checkpoint", "outside"]


@dataclass(frozen=True)
class Metrics:
    """One step of a run, as it is logged."""

    step: int  # counts from 1
    loss: float  # mean over all target tokens of the global batch
    lr: float
    grad_norm: float  # of all gradients together, before clipping
    tokens: int  # trained on by the whole run so far, this step included
    seconds: float  # of this step, waits included, evaluation not
    tokens_per_second: float  # of all processes; over the last steps, as is the mfu
    mfu: float  # attention scores counted in full, as in the PaLM paper
    mfu_causal: float  # only the half of the scores that the mask keeps
    memory: int  # bytes: peak allocated on the GPU, or resident in the process on a CPU
    data_wait: float = 0.0  # seconds of this step in which the data were not there
    checkpoint_wait: float = 0.0  # seconds of this step that a checkpoint took
    skipped: bool = False  # the update was left out: loss or gradients were not finite
    valid_loss: float | None = None  # where this step was evaluated
    balance_loss: float | None = None  # of experts, with its weights; no part of `loss`. This and the next: see Routing
    busiest_expert: float | None = None  # its tokens, in even shares
    load_entropy: float | None = None  # of experts, mean over blocks; 1: all have the same
    dropped: float | None = None  # share of the pairs of a token and an expert
    mean_seconds: float = 0.0  # of a step, over the steps that `tokens_per_second` is of
    eta: float = 0.0  # seconds to the end of the run
    time: float = 0.0  # of the end of the step, seconds since 1970

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Measures the steps of one process's run.

    Start it after everything is built; then, in each step: `with meter.waiting("data")` around the loader,
    `"checkpoint"` around what a save keeps the step from, `"outside"` around what is no training (evaluation); and at
    the end of the step, once the loss is on the CPU, `finish`.
    """

    def __init__(
        self,
        config: Config,
        *,
        world: int,
        peak: Peak,
        device: torch.device,
        start_step: int = 0,
        start_tokens: int = 0,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps = config.train.steps
        self.step_tokens = config.train.global_batch * config.seq
        self.flops_full = config.model.flops_per_token(config.seq, causal=False) / (peak.flops * world)
        self.flops_causal = config.model.flops_per_token(config.seq, causal=True) / (peak.flops * world)
        self.device, self.start_step, self.tokens, self.clock = device, start_step, start_tokens, clock
        self.recent: deque[float] = deque(maxlen=window)  # seconds of the last steps
        self.waits: dict[Wait, float] = {"data": 0.0, "checkpoint": 0.0, "outside": 0.0}
        self.began = clock()

    @contextmanager
    def waiting(self, what: Wait) -> Iterator[None]:
        """Count the time inside as a wait of this step."""
        start = self.clock()
        try:
            yield
        finally:
            self.waits[what] += self.clock() - start

    def finish(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        skipped: bool = False,
        valid_loss: float | None = None,
        routing: Routing | None = None,
    ) -> Metrics:
        """End a step, and begin the next."""
        now = self.clock()
        seconds = max(now - self.began - self.waits["outside"], 1e-9)
        if step == self.start_step + 2:
            self.recent.clear()  # the first step compiles, allocates, connects: it says nothing of the others
        self.recent.append(seconds)
        per_step = sum(self.recent) / len(self.recent)
        rate = self.step_tokens / per_step
        self.tokens += self.step_tokens  # steps before may have been of another size
        metrics = Metrics(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.tokens,
            seconds=seconds,
            tokens_per_second=rate,
            mfu=rate * self.flops_full,
            mfu_causal=rate * self.flops_causal,
            memory=memory_used(self.device),
            data_wait=self.waits["data"],
            checkpoint_wait=self.waits["checkpoint"],
            skipped=skipped,
            valid_loss=valid_loss,
            balance_loss=routing.loss if routing else None,
            busiest_expert=routing.imbalance if routing else None,
            load_entropy=routing.entropy if routing else None,
            dropped=routing.dropped_share if routing else None,
            mean_seconds=per_step,
            eta=per_step * (self.steps - step),
            time=time.time(),
        )
        self.waits = dict.fromkeys(self.waits, 0.0)
        self.began = now
        return metrics


def memory_used(device: torch.device) -> int:
    """Bytes: the peak that torch allocated on this GPU since the start, or what this process holds in RAM now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # not Linux: the peak is all there is
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
