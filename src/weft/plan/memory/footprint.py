"""The memory of the fullest process, in closed form, for a search over many layouts. Torch-free.

plan/memory/moments.py counts weft's own steps moment by moment; this is the same in a few terms, and for other systems too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.plan.memory.head import Head
from weft.plan.memory.held import Held, low_blocks
from weft.plan.memory.kept import Kept
from weft.plan.time.block import parameters, widths
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.imbalance import fullest
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
        """How near this is: as that of the time. Activations are known worse than states."""
        return 0.06 + 0.14 * self.activations / self.total

    @property
    def total(self) -> Num:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class Flight:
    """Activations of the micro-batches in flight, in bytes.

    Attributes:
        per_block: of one micro-batch, by the mean block, where some keep their input alone.
        flying: micro-batches in flight.
        kept: of all of them, at the fullest moment; `with_logits`: while the logits are there.
        delayed: by one block of one micro-batch whose gradients of weights are put off.
        released: what all blocks have let go of when gradients that were put off are made.
    """

    per_block: Num
    flying: Num
    kept: Num
    with_logits: Num
    delayed: Num
    released: Num

    @classmethod
    def of(cls, work: Work, held: Held, kept: Kept, head: Head | None) -> Flight:
        c, soft = work.cut, work.software
        one = work.tokens * work.sizes.hidden * c.item / np.where(c.sp, c.tp, 1)
        sent = soft.results * (c.pp > 1) * c.vp * one  # weft keeps what each stage gave, the root of its backward pass
        per_block = c.full * one + (1 - c.full) * kept.block + sent / held.blocks
        flying, most, late = fullest_moment(work, held, per_block, kept.delayed, head)
        waiting = np.minimum(flying, c.put_off)
        here = np.minimum(2, flying * held.blocks) * per_block + held.blocks * waiting * kept.delayed
        # a share that goes is that of the first blocks (Transformer Engine's), which are gone when the last are there
        most = np.where(c.offload > 0, np.maximum(here + flying * sent, (1 - c.offload) * most), most)
        # one block is on its way while the logits are there, and two when they are gone
        logits = head.logits if head else 0.0
        with_logits = np.where(c.offload > 0, most - np.minimum(here / 2, logits), most)
        # there and back, late processes have nothing else in flight any more when gradients that were put off are made
        return cls(per_block, flying, most, with_logits, kept.delayed, np.where(c.vee, 0.0, most - late))


def fullest_moment(work: Work, held: Held, per_block: Num, delayed: Num, head: Head | None) -> tuple[Num, Num, Num]:
    """Micro-batches in flight, the most that these and those keep whose gradients of weights wait, and what they keep when
    most of the latter do: of the process with the head; or of the fullest of all others, which have one block more each up
    to some place in the pipeline."""
    c = work.cut
    if head is not None:
        return moment(work, held.blocks, np.where(c.vee, 0, c.pp - 1), per_block, delayed)
    found = moment(work, held.blocks, 1.0 * c.vee, per_block, delayed)
    if not np.any(c.put_off > 0):
        return found
    low, last_high = low_blocks(work, held)
    for blocks, place in ((held.blocks, last_high), (low, c.pp - 1 - (c.vee == 0))):
        other = moment(work, blocks, place, per_block, delayed)
        found = tuple(np.where(other[1] > found[1], new, old) for new, old in zip(other, found, strict=True))
    return found


def moment(work: Work, blocks: Num, place: Num, per_block: Num, delayed: Num) -> tuple[Num, Num, Num]:
    """The same of a process with so many blocks, at this place of the pipeline."""
    c, count = work.cut, work.micro_batches
    most = np.minimum(count, c.flying)
    # the first of a pipeline has most in flight, the last least; there and back it is the other way round, until the first
    # micro-batch has come back
    fewest = (place > 0) & (c.vp > 1) & np.isfinite(c.flying)
    along = np.minimum(count, np.where(fewest, 1, np.maximum(1, c.flying - place)))
    flying = np.where(c.vee, np.minimum(most, (count + 1 + place) / 2), along)
    # and gives up what it has for gradients that wait
    behind = np.minimum(most, c.put_off * (place + 0.5) / (c.pp - 0.5))
    waiting = np.where(c.vee, behind, (c.put_off > 0) * (most - along))
    left = np.where(c.vee, np.maximum(0, most - 0.5 - waiting), along)
    # there they are early and many in flight, back they are late: an odd block is there
    odd = c.vee * (blocks % 2) * np.maximum(0.0, 1 - np.where(place > 0, 3, 1) / flying)
    ends = ((c.put_off > 0) & (c.vp == 1)) * np.maximum(0, delayed - per_block)  # of the pass that comes to its end
    late = blocks * (left * per_block + waiting * delayed + ends)
    return flying, np.maximum((blocks + odd) * flying * per_block, late), late


def footprint(work: Work, *, first: bool = False) -> Footprint:
    """Of the fullest process, or of the first stage's, which is the one that most systems report."""
    kept, c = Kept.of(work), work.cut
    last = process(work, kept, head=True)
    if not np.any(c.pp > 1):
        return last
    other = process(work, kept, head=False, first=first)
    chosen = np.logical_not(c.vee) if first else other.total > last.total
    pairs = ((getattr(other, field.name), getattr(last, field.name)) for field in fields(Footprint))
    return Footprint(*(np.where(chosen & (c.pp > 1), one, another) for one, another in pairs))


def process(work: Work, kept: Kept, *, head: bool, first: bool = False) -> Footprint:
    """Of one process: see `Held.of`."""
    c, soft = work.cut, work.software
    held = Held.of(work, head=head, first=first)
    top = Head.of(work, held) if head else None
    flight = Flight.of(work, held, kept, top)
    logits = flight.with_logits + top.logits - flight.kept if top else 0.0
    weights, gradients, optimizer = states(work, held)
    buckets = (c.zero == 0) & (c.replicas * c.cp > 1)  # are there from the start
    come = (soft.freed > 0) & (work.micro_batches <= 1) & np.logical_not(buckets)
    gradients = np.where(come, np.maximum(0.0, gradients - flight.kept - logits), gradients)
    axes = 1.0 * (c.tp > 1) + (c.pp > 1) + (c.cp > 1) + (c.replicas > 1)
    backward = working(work, held, flight, kept, logits, top.beside if top else 0.0)
    return Footprint(
        weights=weights, gradients=gradients, optimizer=optimizer, gathered=gathered(work, held), activations=flight.kept,
        working=backward, logits=logits, outside=C.outside + C.communicator * axes, host=on_host(work, held, flight),
    )  # fmt: skip


def states(work: Work, held: Held) -> tuple[Num, Num, Num]:
    """Bytes of this process's share of weights, gradients, and what the optimizer has."""
    c, soft = work.cut, work.software
    here = 1 - c.away
    apart = (c.zero == 3) | ((c.zero > 0) & (soft.weights > c.item))  # ZeRO 1 and 2 shard what is not computed with
    goes = (c.zero >= 2) | ((c.zero == 0) & (c.away > 0))  # FSDP over one process brings them down too
    goes = goes | (
        (c.zero == 1) & (soft.weights > c.item) & (work.micro_batches <= 1)
    )  # block by block, in the one pass
    moments = (1 - c.moments_away) * (soft.master + soft.moments)
    return (
        here * soft.weights * np.where(apart, held.share, held.whole),
        soft.gradients * np.where(goes, here * held.share, held.whole),
        here * moments * np.where(c.zero >= 1, held.share, held.whole),
    )


def gathered(work: Work, held: Held) -> Num:
    """Bytes of whole weights, and of copies of them."""
    c, soft = work.cut, work.software
    copies = np.where(soft.weights > c.item, c.item, 0.0) * held.whole
    copies = copies + c.fp8 * soft.copies8 * held.blocks * held.block
    two = 2 * held.block * np.minimum(c.item, soft.weights) + held.tables * c.item
    head = (c.zero == 3) * held.table * c.item  # its gradient waits whole until all others are reduced
    come = c.away * soft.weights * held.block / held.shards  # a share that has come up to be gathered
    return np.where(c.zero == 3, two, copies) + head + come


def on_host(work: Work, held: Held, flight: Flight) -> Num:
    """Bytes in the CPU's memory."""
    c, soft = work.cut, work.software
    copied = soft.gradients + soft.moments + np.where(soft.master > 0, soft.master, soft.weights)
    return (
        c.offload * flight.flying * held.blocks * flight.per_block
        + c.away * held.share * (soft.weights + soft.gradients + soft.master + soft.moments)
        + c.moments_away * np.where(c.zero >= 1, held.share, held.whole) * copied
    )


def working(work: Work, held: Held, flight: Flight, kept: Kept, logits: Num, head: Num) -> Num:
    """Bytes that a backward pass takes beside what was kept: those of logits, which are gone by then, are there again; or
    those that the head's takes, `head`."""
    s, c, soft, share = work.sizes, work.cut, work.software, work.mixed
    # gradients inside of a block's MLP, while all else is still kept
    routed = s.expert_ffn * s.per_token * fullest(work) / c.etp / c.tp
    inner = (1 - share) * s.ffn / c.tp + share * (routed + s.shared_ffn / c.tp)
    inner = c.item * work.tokens * (s.matrices * inner + 2 * s.hidden)
    inner = np.maximum(inner, 2 * c.item * work.tokens * s.hidden + meeting(work))
    plain = kept.redone + np.maximum(0.0, inner - logits)
    # FSDP2 has a block's gradients as they came and as they are reduced, beside all that the block does; or until then what
    # those of the tables were reduced from, in the pass before
    reduced = (c.item + soft.reduced) * held.block + c.away * soft.reduced * held.block / held.shards
    reduced = np.maximum(reduced, (c.zero != 1) * (work.micro_batches > 1) * soft.reduced * held.tables)
    fsdp2 = np.maximum(0.0, kept.redone + kept.remade + inner + reduced - logits)
    most = np.where((soft.weights > c.item) & (soft.alternate == 0), fsdp2, plain)
    most = np.maximum(most, head)
    # what was put off is made for all blocks of a stage, and then reduced, when what it was made of is gone; where nothing
    # is reduced, experts' is added up at once
    made, done = held.blocks * held.block, flight.delayed * held.blocks / c.vp
    once = c.item * held.blocks / c.vp * np.where((c.zero > 0) | (c.away > 0), held.block, parameters(work)[0])
    ends = held.tables / (1 + c.vee)
    at_once = soft.reduced * np.maximum(held.block, ends) * (1 + 1 / held.shards)
    unreduced = (c.zero == 1) & (work.micro_batches > 1)
    reduced = at_once + np.where(unreduced, 0.0, soft.reduced * (made + ends)) - done
    reduced = np.where((c.zero > 0) | (c.away > 0), reduced, 0.0)
    made = (c.put_off > 0) * (soft.weights > c.item) * np.maximum(once, reduced) - flight.released * (c.offload == 0)
    return np.maximum(most + 2 * work.tokens * s.hidden * c.item, made)


def meeting(work: Work) -> Num:
    """Bytes that attention under cp has in a backward pass beside what was kept: keys and values of others as they arrive
    and in order, and the fp32 sums of gradients, which travel too (plan/memory/activations.py counts the same)."""
    c = work.cut
    query, kv = widths(work)
    arriving = np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 6 * kv)
    sums = query + np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 8 * kv)
    ring = c.item * arriving + 4 * sums
    return work.tokens * np.where(c.cp > 1, np.where(c.ulysses > 0, c.item * (query + 2 * kv), ring), 0.0)
