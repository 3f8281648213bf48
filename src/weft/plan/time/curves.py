"""Curves: how long operations take on a machine, as measured there, to be read between the measured sizes. Torch-free."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise, product
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Grid(BaseModel):
    """Seconds of one operation at every combination of some sizes.

    Between them seconds are a power of each size: straight in logarithms, from point to point. Beyond the ends the
    outermost stretch goes on, as a power or, where that is less than the size, as a start and a rate. An axis of one size
    says nothing of others.

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
        return self._read(sizes, 0)

    def rate(self) -> float:
        """Of a matrix product, the FLOP/s of the sizes that have most."""
        return max(2 * prod(sizes) / seconds for sizes, seconds in zip(product(*self.axes), self.seconds, strict=True))

    def _read(self, sizes: tuple[float, ...], index: int) -> float:
        """Seconds at the sizes of the axes that are left; `index`: how many combinations lie before those of the first."""
        if not sizes:
            return self.seconds[index]
        axis, size, later = self.axes[-len(sizes)], sizes[0], sizes[1:]
        if len(axis) == 1:
            return self._read(later, index)
        low = min(max(bisect_right(axis, size) - 1, 0), len(axis) - 2)
        below, above = (self._read(later, index * len(axis) + place) for place in (low, low + 1))
        return _between(axis[low], axis[low + 1], below, above, size)


def _between(low: float, high: float, below: float, above: float, size: float) -> float:
    """Seconds at a size, of those at two others. What grows slower than its size is still waiting for its start: beyond
    `high` what it takes more for more is what it took."""
    if size > high and above < below * high / low:
        return above + max(0.0, above - below) * (size - high) / (high - low)
    share = math.log(size / low) / math.log(high / low)
    return below ** (1 - share) * above**share


class Curves(BaseModel):
    """What `weft plan calibrate` has measured; the table `[curves]` of a cluster file.

    Attributes:
        processes: that were at work at once on this machine, each with so many `threads`: what they take from each
            other is part of every time.
        device: cpu or cuda. What launching a kernel takes is in its time: on a GPU where that waits for it.
        beside: share of the shorter of a message and a computation that is hidden when both go on at once.
        unit: seconds that FSDP2 takes to gather the weights of a block, or to reduce its gradients, beside the bytes.
        compute_scale, message_scale: what a run has taken, over what the curves say: `weft plan calibrate --from-run`.
        grids: by name: see weft.tune.measure, which makes them, and weft.plan.time.counted, which reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(ge=1)
    threads: int = Field(ge=1)
    device: Literal["cpu", "cuda"]
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

    @property
    def peak(self) -> float:
        """FLOP/s of the matrix product that has most, by what runs have taken."""
        products = [grid for name, grid in self.grids.items() if name.startswith("product_")]
        return max(map(Grid.rate, products)) / self.compute_scale

    def _grid(self, name: str) -> Grid:
        if name not in self.grids:
            raise ValueError(
                f"the cluster file has no curve {name}: measure it again, with this version's `weft plan calibrate`"
            )
        return self.grids[name]
