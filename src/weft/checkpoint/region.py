"""Region: the box of a whole tensor that one process holds. Torch-free but for the type of a Piece's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Region:
    """Rows `start[d]` to `stop[d]` of every dim `d` of the tensor `name`, whose sizes as a whole are `sizes`."""

    name: str
    sizes: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, sizes: tuple[int, ...]) -> Region:
        return cls(name, sizes, (0,) * len(sizes), sizes)

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the region in the whole tensor."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def empty(self) -> bool:
        return 0 in self.dims

    def narrow(self, dim: int, start: int, stop: int) -> Region:
        """The part of this region between `start` and `stop`, counted from its own start, along one dim."""
        starts, stops = list(self.start), list(self.stop)
        starts[dim], stops[dim] = self.start[dim] + start, self.start[dim] + stop
        return Region(self.name, self.sizes, tuple(starts), tuple(stops))


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor: where it lies in the whole, and its numbers.

    `writes`: this process is the one, among those that hold the same region, that stores it.
    """

    region: Region
    data: Tensor
    writes: bool = True
