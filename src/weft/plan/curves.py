"""Curves: how long operations take on a machine, as measured there, to be read between the measured sizes. Torch-free."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise, product
from math import prod

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Grid(BaseModel):
    """Seconds of one operation at every combination of some sizes.

    Between them seconds are a power of each size: straight in logarithms, from point to point. Beyond the ends the
    outermost stretch goes on. An axis of one size says nothing of others.

    Attributes:
        axes: the measured sizes of each axis, ascending.
        seconds: of every combination, the last axis changing fastest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Grid:
        if any(not axis or axis[0] <= 0 or any(a >= b for a, b in pairwise(axis)) for axis in self.axes):
            raise ValueError("axes of a curve are ascending sizes above 0")
        if prod(map(len, self.axes)) != len(self.seconds):
            raise ValueError(f"a curve of {prod(map(len, self.axes))} combinations has {len(self.seconds)} times")
        if not all(time > 0 for time in self.seconds):
            raise ValueError("every time of a curve is above 0")
        return self

    def at(self, *sizes: float) -> float:
        """Seconds at these sizes, one for each axis; 0 where any of them is 0: there is nothing to do."""
        assert len(sizes) == len(self.axes)
        if min(sizes) <= 0:
            return 0.0
        places = [_place(axis, size) for axis, size in zip(self.axes, sizes, strict=True)]
        total = 0.0
        for corner in product((0, 1), repeat=len(places)):
            weight, index = 1.0, 0
            for side, (low, share), axis in zip(corner, places, self.axes, strict=True):
                weight *= share if side else 1 - share
                index = index * len(axis) + min(low + side, len(axis) - 1)
            if weight:
                total += weight * math.log(self.seconds[index])
        return math.exp(total)


def _place(axis: tuple[float, ...], size: float) -> tuple[int, float]:
    """The stretch that a size lies in, by its lower end, and how far up in it; beyond 0 and 1 outside of the axis."""
    if len(axis) == 1:
        return 0, 0.0
    low = min(max(bisect_right(axis, size) - 1, 0), len(axis) - 2)
    return low, math.log(size / axis[low]) / math.log(axis[low + 1] / axis[low])


class Curves(BaseModel):
    """What `weft plan calibrate` has measured; the table `[curves]` of a cluster file.

    Attributes:
        processes: that were at work at once on this machine, each with so many `threads`: what they take from each
            other is part of every time.
        device: cpu or cuda. What launching a kernel takes is in its time: on a GPU where that waits for it.
        beside: share of the shorter of a message and a computation that is hidden when both go on at once.
        unit: seconds that FSDP2 takes to gather the weights of a block, or to reduce its gradients, beside the bytes.
        compute_scale, message_scale: what a run has taken, over what the curves say: `weft plan calibrate --from-run`.
        grids: by name: see weft.tune.measure, which makes them, and weft.plan.counted, which reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(ge=1)
    threads: int = Field(ge=1)
    device: str
    beside: float = Field(ge=0, le=1)
    unit: float = Field(ge=0)
    compute_scale: float = Field(1.0, gt=0)
    message_scale: float = Field(1.0, gt=0)
    grids: dict[str, Grid]

    def compute(self, name: str, *sizes: float) -> float:
        """Seconds of an operation of this process."""
        return self.compute_scale * self._grid(name).at(*sizes)

    def message(self, name: str, processes: float, size: float) -> float:
        """Seconds of a message of `size` bytes: of what each process gives to an all-reduce, all-to-all or send, of all
        that is there after an all-gather or before a reduce-scatter. None with one process."""
        return self.message_scale * self._grid(name).at(processes, size) if processes > 1 else 0.0

    def _grid(self, name: str) -> Grid:
        if name not in self.grids:
            raise ValueError(
                f"the cluster file has no curve {name}: measure it again, with this version's `weft plan calibrate`"
            )
        return self.grids[name]
