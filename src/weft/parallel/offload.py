"""Activation offload: what blocks keep for their backward pass waits in the CPU's memory (Rhu et al., vDNN, 2016).

While a block works, all that it keeps stays; when it is done, nothing of that but the weights does. On a GPU copies travel
on streams of their own, beside the computation, into pinned memory and back; when backward asks for the first tensor of a
block, it sends for those of the block before. On a CPU the same copies are made.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALL = 2**14
"""Bytes that are not worth a journey."""


def offload_blocks(blocks: nn.ModuleDict) -> None:
    """Wrap the forward of each block. Recomputation is inside: of a block that does it, the input alone travels."""
    modules, depot = list(blocks.values()), Depot()
    for index, block in enumerate(modules):
        block.forward = functools.partial(depot.run, block.forward, block, index == 0)


class Depot:
    """What the blocks of one chunk have away, and the way there."""

    def __init__(self) -> None:
        self.last: Callable[[], Load | None] = lambda: None  # of the block before, in the same pass, while it lives
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def run(self, forward: Callable[..., Tensor], block: nn.Module, first: bool, x: Tensor, *rest: Any) -> Tensor:
        """The block's forward pass; `rest`, positions and masks, are the same for all blocks and stay."""
        if not torch.is_grad_enabled():
            return forward(x, *rest)
        if x.is_cuda and self.streams is None:
            self.streams = torch.cuda.Stream(), torch.cuda.Stream()
        load = Load(self.streams, None if first else self.last(), list(storages(rest)))
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(load.pack, block), load.unpack):
            y = forward(x, *rest)
        load.here.clear()
        self.last = weakref.ref(load)
        return y


@dataclass(eq=False)
class Crate:
    """One storage on its way: several saved tensors may be views of it.

    Attributes:
        away: its bytes, in the CPU's memory.
        left: views that backward has not yet asked for; after the last one nothing is held.
        arrived: on the GPU, when the copy there is done.
        back: its bytes where they came from, from the first asking to the last.
    """

    away: Tensor
    device: torch.device
    arrived: torch.cuda.Event | None = None
    left: int = 0
    back: Tensor | None = None


@dataclass(frozen=True)
class View:
    """A saved tensor, as a view of its crate."""

    crate: Crate
    dtype: torch.dtype
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Load:
    """What one block keeps of one micro-batch."""

    streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None
    before: Load | None
    shared: list[int]
    crates: dict[int, Crate] = field(default_factory=dict)
    here: list[Tensor] = field(default_factory=list)  # so long no other storage has the same address

    def pack(self, block: nn.Module, x: Tensor) -> View | Tensor:
        storage = x.untyped_storage()
        place = storage._cdata
        gathered = (weight for weight in block.parameters() if not isinstance(weight, DTensor))
        weights = (weight.untyped_storage()._cdata for weight in gathered)
        if storage.nbytes() < SMALL or place in self.shared or place in weights:
            return x
        if place not in self.crates:
            self.here.append(x.detach())
            self.crates[place] = self._send(x.detach())
        crate = self.crates[place]
        crate.left += 1
        return View(crate, x.dtype, x.shape, x.stride(), int(x.storage_offset()))

    def unpack(self, saved: View | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        crate = saved.crate
        self._fetch(crate)
        if self.before is not None:  # backward is with it next
            for other in self.before.crates.values():
                self._fetch(other)
            self.before = None
        assert crate.back is not None
        if self.streams is not None:
            torch.cuda.current_stream().wait_stream(self.streams[1])
            crate.back.record_stream(torch.cuda.current_stream())
        x = crate.back.view(saved.dtype).as_strided(saved.sizes, saved.strides, saved.offset)
        crate.left -= 1
        if not crate.left:
            crate.back = None
        return x

    def _send(self, x: Tensor) -> Crate:
        """All of a tensor's storage, whatever part of it the tensor sees."""
        flat = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).view(torch.uint8)
        if self.streams is None:
            return Crate(flat.clone(), flat.device)
        down = self.streams[0]
        down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(down):
            away = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True).copy_(flat, non_blocking=True)
            flat.record_stream(down)
        return Crate(away, flat.device, down.record_event())

    def _fetch(self, crate: Crate) -> None:
        if crate.back is not None:
            return
        if self.streams is None:
            crate.back = crate.away.clone()
            return
        assert crate.arrived is not None
        up = self.streams[1]
        up.wait_event(crate.arrived)
        with torch.cuda.stream(up):
            crate.back = crate.away.to(crate.device, non_blocking=True)


def storages(values: Iterable[Any]) -> Iterator[int]:
    """Which storages all tensors in nested tuples have: their addresses, that of a storage without memory too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()._cdata
        elif isinstance(value, tuple):
            yield from storages(value)
