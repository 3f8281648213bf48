"""The memory of the fullest process, in closed form, for a search over many layouts. Torch-free.

plan/memory/moments.py counts weft's own steps moment by moment; this is the same in a few terms, and for other systems too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.plan.columns import chosen
from weft.plan.memory.flight import Flight
from weft.plan.memory.fullest import fullest
from weft.plan.memory.head import Head
from weft.plan.memory.held import Held, processes
from weft.plan.memory.kept import Kept, known
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.work import Machine, Num, Work


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        weights, gradients, optimizer: this process's share of each; of gradients, what is there at the fullest moment.
        gathered: whole weights of the blocks at work, under ZeRO-3, and low-precision copies.
        activations: kept for backward, of all micro-batches in flight.
        working: what one block needs while it is computed, or computed again.
        logits: with their gradient and the loss's workspace.
        outside: context, communicators, workspaces.
        host: in the CPU's memory; no part of `total`.
        mixed: share of the blocks that have experts; no part of it either.
    """

    weights: Num
    gradients: Num
    optimizer: Num
    gathered: Num
    activations: Num
    working: Num
    logits: Num
    outside: Num
    host: Num = 0.0
    mixed: Num = 0.0

    def fits(self, machine: Machine) -> Num:
        """Whether a GPU holds it, with what the allocator cannot use, and its part of the CPU's memory the rest."""
        return (self.total <= C.usable * machine.memory) & (self.host <= C.usable * machine.host_memory)

    def sure(self, machine: Machine) -> Num:
        """Whether it does so even if it is more by all of `spread`."""
        return self.fits(machine) & ((1 + self.spread) * self.total <= C.usable * machine.memory)

    @property
    def allocated(self) -> Num:
        """What an allocator reports: all but what it does not see."""
        return self.total - self.outside

    @property
    def spread(self) -> Num:
        """How near this is: as that of the time. Activations are known worse than states, and mixtures, whose processes are
        given more tokens now and fewer then, worse than dense models."""
        return 0.06 + 0.2 * (self.mixed > 0) + 0.14 * self.activations / self.total

    @property
    def total(self) -> Num:
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in ("host", "mixed"))


def footprint(work: Work, *, first: bool = False) -> Footprint:
    """Of the fullest process, or of the first stage's, which is the one that most systems report."""
    kept, c = Kept.of(work), work.cut
    found, *others = (process(work, held, kept) for held in processes(work, first=first))
    for other in others:
        fuller = np.logical_not(c.vee) if first else other.total > found.total
        found = chosen((c.pp > 1) & fuller, other, found)
    return found


def process(work: Work, held: Held, kept: Kept) -> Footprint:
    """Of one process."""
    c, flight = work.cut, Flight.of(work, held, kept)
    head = Head.of(work, held, kept) if held.head else None
    weights, gradients, optimizer = states(work, held)
    logits = head.logits + head.waiting if head else 0.0
    most = fullest(work, held, kept, flight, head, gradients)
    activations = np.minimum(flight.kept, most - logits)
    there = np.minimum(gradients, most - activations - logits)
    axes = 1.0 * (c.tp > 1) + (c.pp > 1) + (c.cp > 1) + (c.replicas > 1)
    return Footprint(
        weights=weights, gradients=there, optimizer=optimizer, gathered=gathered(work, held), activations=activations,
        working=most - activations - logits - there, logits=logits, outside=C.outside + C.communicator * axes,
        host=on_host(work, held, flight), mixed=work.mixed,
    )  # fmt: skip


def states(work: Work, held: Held) -> tuple[Num, Num, Num]:
    """Bytes of this process's share of weights, gradients, and what the optimizer has."""
    c, soft = work.cut, work.software
    here, lower = 1 - c.away, (soft.own_head > 0) | (soft.weights > c.item)
    apart = (c.zero == 3) | (c.zero > 0) & lower  # ZeRO 1 and 2 shard what is not computed with
    goes = (c.zero >= 2) | ((c.zero == 0) & (c.away > 0))  # FSDP over one process brings them down too
    goes = goes | (c.zero == 1) & lower & (work.micro_batches <= 1)  # block by block, in the one pass
    moments = (1 - c.moments_away) * (soft.master + soft.moments)
    return (
        here * soft.weights * np.where(apart, held.share, held.whole),
        soft.gradients * np.where(goes, here * held.share, held.whole),
        here * moments * np.where(c.zero >= 1, held.share, held.whole),
    )


def gathered(work: Work, held: Held) -> Num:
    """Bytes of whole weights, and of copies of them."""
    c, soft = work.cut, work.software
    apart = (soft.weights > c.item) | (soft.own_head > 0) & (c.zero > 0)
    copies = apart * c.item * held.whole + c.fp8 * soft.copies8 * held.blocks * held.block
    # two blocks, but the experts of one alone, where they are a group of their own
    experts = (held.block - held.common) * np.where(known(work), 1, np.minimum(2, held.blocks))
    two = np.minimum(2, held.blocks) * held.common + experts
    two = two * np.minimum(c.item, soft.weights) + held.tables * c.item
    # the head's gradient waits whole until all others are reduced; weft's is told where it matters
    head = (c.zero == 3) * (soft.own_head == 0) * held.table * c.item
    come = c.away * soft.weights * held.block_share  # a share that has come up to be gathered
    return np.where(c.zero == 3, two, copies) + head + come


def on_host(work: Work, held: Held, flight: Flight) -> Num:
    """Bytes in the CPU's memory."""
    c, soft = work.cut, work.software
    copied = soft.gradients + soft.moments + np.where(soft.master > 0, soft.master, soft.weights)
    return (
        c.offload * flight.flying * flight.one
        + c.away * held.share * (soft.weights + soft.gradients + soft.master + soft.moments)
        + c.moments_away * np.where(c.zero >= 1, held.share, held.whole) * copied
    )
