"""Ledger: every piece of memory of a step, from its birth to its death, and what was there when most was."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Holding:
    """The memory of one storage.

    Attributes:
        module: where it was made; in backward, of whose backward pass.
        phase: the number of the phase in which it was made; `until`: in which it was freed, None if it never was.
        born, died: the ledger's count of changes at these moments.
        kind: one of plan/memory/moments.py's TENSORS, where somebody has said so.
    """

    size: int
    module: str
    phase: int
    born: int
    until: int | None = None
    died: int | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the step: a forward pass, a backward pass, or what lies between.

    Attributes:
        name: build, forward, backward, between passes, or update.
        start: the ledger's count at its beginning.
    """

    name: str
    start: int


@dataclass
class Ledger:
    """Sizes are those of storages: views are not counted, nor what a kernel takes for itself while it runs."""

    holdings: list[Holding] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=lambda: [Phase("build", 0)])
    now: int = 0
    closed: bool = False  # what happens now is no longer a part of the step
    total: int = 0
    peak: int = 0
    peak_at: int = 0
    _live: dict[int, tuple[Holding, weakref.ref[torch.UntypedStorage]]] = field(default_factory=dict)
    _elsewhere: dict[int, weakref.ref[torch.UntypedStorage]] = field(default_factory=dict)

    def see(self, x: Tensor, module: str) -> None:
        """Take a tensor's memory down, if it is new."""
        storage = x.untyped_storage()
        if storage._cdata not in self._live and storage._cdata not in self._elsewhere:
            self._open(storage, module)

    def resized(self, storage: torch.UntypedStorage, module: str) -> None:
        """A storage has another size now: what it was is gone."""
        if storage._cdata in self._live:
            self._close(storage._cdata)
            self._open(storage, module, "copies")

    def mark(self, x: Tensor, kind: str) -> None:
        """Say what a tensor's memory is, if nobody has."""
        found = self._live.get(x.untyped_storage()._cdata)
        if found is not None and found[0].kind is None:
            found[0].kind = kind

    def mark_rest(self, kind: str) -> None:
        """Say it of all that is there and has no name."""
        for holding, _ in self._live.values():
            holding.kind = holding.kind or kind

    def dismiss(self, x: Tensor) -> None:
        """A tensor's memory is none of this device's, whatever is written to it."""
        storage, key = x.untyped_storage(), x.untyped_storage()._cdata
        self._close(key)
        self._elsewhere[key] = weakref.ref(storage, lambda _: self._elsewhere.pop(key))

    def begin(self, name: str) -> None:
        if len(self.phases) == 1:  # what building took is past
            self.peak, self.peak_at = self.total, self.now
        self.phases.append(Phase(name, self.now))

    @property
    def peak_moment(self) -> str:
        """backward, 3rd of 8"""
        phase = next(it for it in reversed(self.phases) if it.start <= self.peak_at)
        like = [it for it in self.phases if it.name == phase.name]
        return f"{phase.name}, {like.index(phase) + 1} of {len(like)}" if len(like) > 1 else phase.name

    def alive(self, at: int) -> Iterator[Holding]:
        return (it for it in self.holdings if it.born <= at and (it.died is None or it.died > at))

    def kind(self, holding: Holding) -> str:
        """What is kept is made in one phase and freed in another; what is not is temporary. What a backward pass makes and
        leaves are gradients: on their way to a reduction, to another stage, or to products that are put off."""
        if holding.kind is not None:
            return holding.kind
        if holding.until == holding.phase:
            return "temporary"
        if self.phases[holding.phase].name == "backward":
            return "gradients"
        return "logits" if holding.module.endswith("head") else "activations"

    def _open(self, storage: torch.UntypedStorage, module: str, kind: str | None = None) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.now += 1
        holding = Holding(size, module, len(self.phases) - 1, self.now, kind=kind)
        self._live[key] = holding, weakref.ref(storage, lambda _: self._close(key))
        self.holdings.append(holding)
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_at = self.total, self.now

    def _close(self, key: int) -> None:
        found = self._live.pop(key, None)
        if found is not None and not self.closed:
            self.now += 1
            found[0].died, found[0].until = self.now, len(self.phases) - 1
            self.total -= found[0].size
