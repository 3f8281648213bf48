"""The learning rate of each step: a pure function, so that a resumed run needs no state of it. Torch-free."""

from __future__ import annotations

import math

from weft.config.tree import ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, *, peak: float, steps: int) -> float:
    """The learning rate of update number `step`, which counts from 1 to `steps`.

    Warm-up is linear from 0 (never used) and reaches `peak` at step `schedule.warmup`; the last step has
    `schedule.min_ratio · peak`, except with `constant`. After the last step the rate stays what it was there.

    Sources: cosine, Loshchilov and Hutter 2017 (SGDR); wsd (warm up, stay, descend linearly), Hu et al. 2024
    (MiniCPM, §4).

    Raises:
        ValueError: a step below 1.
    """
    if step < 1:
        raise ValueError(f"the learning rate is asked for at step {step}: steps count from 1")
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    if schedule.kind == "constant":
        return peak
    low, descent = peak * schedule.min_ratio, schedule.descent(steps)
    progress = min(1.0, max(0.0, (step - (steps - descent)) / descent))
    if schedule.kind == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return low * progress + peak * (1 - progress)
