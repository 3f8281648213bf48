"""The memory of the fullest process, in closed form, for a search over many layouts. Torch-free.

plan/memory.py counts weft's own steps moment by moment; this is the same in a few terms, and for other systems too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from weft.plan.block import parameters, widths
from weft.plan.constants import CONSTANTS as C
from weft.plan.head import Head
from weft.plan.imbalance import fullest
from weft.plan.kept import Kept
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
class Held:
    """Parameters of the fullest process.

    Attributes:
        blocks: how many it has.
        block: of one of them; `table`: of one of the vocabulary's.
        tables: of all that are no block's.
        whole, share: of all; and of those, where they are shared among the replicas.
        shards: processes that share a block.
    """

    blocks: Num
    block: Num
    table: Num
    tables: Num
    whole: Num
    share: Num
    shards: Num

    @classmethod
    def of(cls, work: Work, first: bool = False, inside: bool = False) -> Held:
        """`inside`: where a pipeline goes there and back, of the process that has neither end, not of that with both."""
        s, c = work.sizes, work.cut
        common, experts, table = parameters(work)
        with_head, others = dealt_blocks(work)
        blocks: Num = np.where(c.vee, others if inside else with_head, np.maximum(with_head, others))
        if first:
            blocks = blocks - np.where((work.software.balanced == 0) & work.tables_as_blocks, 1, 0)
        tables = table * np.where(c.pp > 1, 1.0 + c.vee, 2 - s.tied) + s.positions * s.hidden
        tables = np.where(c.vee, 0.0, tables) if inside else tables
        share = (blocks * common + tables) / c.shards + blocks * experts / c.expert_shards
        return cls(blocks, common + experts, table, tables, blocks * (common + experts) + tables, share, c.shards)


def dealt_blocks(work: Work) -> tuple[Num, Num]:
    """Blocks of the process with the head, and the most of any other."""
    s, c, soft = work.sizes, work.cut, work.software
    common, experts, _ = parameters(replace(work, cut=replace(c, tp=1, ep=1, etp=1)))
    block = common + experts * s.per_token / np.maximum(1, s.experts)  # what a token is multiplied with
    head = np.where(soft.balanced, s.vocab * s.hidden / block, 0.0)  # is worth so many blocks
    most, late, count = (s.layers + head) / c.pp, soft.balanced > 2, np.maximum(1, c.pp - 1)
    fewest = np.where(late, 0, c.vp)
    beside_head = np.clip(np.floor(most - head + np.where(late, 0.5, 0.0)), fewest, s.layers)
    # one more while the others have no less to do
    more = np.logical_not(late) & (beside_head + head <= np.floor((s.layers - beside_head - 1) / count))
    beside_head = np.clip(beside_head + more, fewest, s.layers)
    rest = s.layers - beside_head  # of the other processes
    others = np.ceil(rest / count)
    # the first of those that have one more keeps as many micro-batches as there are of them, and one
    first = np.ceil(rest / count) * (rest % count + 1) / c.pp
    others = np.where(late & (rest % count > 0), np.maximum(np.floor(rest / count), first), others)
    uneven = (soft.balanced > 1) & (c.pp > 1)
    ends, others = np.where(uneven, beside_head, np.ceil(most)), np.where(uneven, others, 0.0)
    return np.clip(ends, 1, s.layers), np.minimum(others, s.layers)


@dataclass(frozen=True)
class Flight:
    """Activations of the micro-batches in flight, in bytes.

    Attributes:
        per_block: of one micro-batch, by the mean block, where some keep their input alone.
        flying: micro-batches in flight.
        first, last: of the process that has most of them, and of that with the logits.
        delayed: by one block of one micro-batch whose gradients of weights are put off.
        released: what all blocks have let go of when gradients that were put off are made.
    """

    per_block: Num
    flying: Num
    first: Num
    last: Num
    delayed: Num
    released: Num

    @classmethod
    def of(cls, work: Work, held: Held, kept: Kept, head: Head, inside: bool) -> Flight:
        s, c, soft = work.sizes, work.cut, work.software
        delayed = kept.delayed
        one = work.tokens * s.hidden * c.item / np.where(c.sp, c.tp, 1)
        per_block = c.full * one + (1 - c.full) * kept.block
        # weft keeps what each stage gave, too: the root of its backward pass
        per_block = per_block + soft.results * (c.pp > 1) * c.vp * one / held.blocks
        # the process with both ends has half of its blocks at either, and no backward pass before the first has come back
        come = np.where(c.vee & (not inside), (work.micro_batches + 1) / 2, work.micro_batches)
        flying = np.minimum(come, c.flying)
        # there they are early and many in flight, back they are late: an odd block is there
        odd = c.vee * (held.blocks % 2) * np.maximum(0.0, 1 - (3 if inside else 1) / flying)
        waiting = np.minimum(flying, c.put_off)
        later = (flying - waiting) * per_block + waiting * delayed
        here = np.minimum(2, flying * held.blocks) * per_block + held.blocks * waiting * delayed
        early = (held.blocks + odd) * flying * per_block
        first = np.where(c.offload > 0, here, np.maximum(early, held.blocks * later))
        # the first stage of a pipeline has most in flight, the last has the logits; there and back, one process has both
        fewer = np.where(soft.balanced > 0, np.clip(s.layers - (c.pp - 1) * held.blocks, 1, held.blocks), held.blocks)
        behind = np.minimum(flying, head.flying) * per_block + np.maximum(0.0, waiting - 1) * delayed
        last = np.where(c.pp > 1, np.where(c.vee, early, fewer * behind), first)
        # one block is on its way while the logits are there, and two when they are gone
        last = np.where(c.offload > 0, first - np.minimum(first / 2, head.logits), last)
        # there and back, late processes have nothing else in flight any more when gradients that were put off are made
        there = np.where(c.vee, np.maximum(early, held.blocks * waiting * delayed), held.blocks * later)
        return cls(per_block, flying, first, last, delayed, first - there)


def footprint(work: Work, *, first: bool = False) -> Footprint:
    """Of the fullest process, or of the first stage's, which is the one that most systems report."""
    kept = Kept.of(work)
    ends = process(work, kept, first=first, inside=False)
    if first or not np.any(work.cut.vee):
        return ends
    inside = process(work, kept, first=False, inside=True)
    fuller = work.cut.vee & (inside.total > ends.total)
    pairs = ((getattr(inside, field.name), getattr(ends, field.name)) for field in fields(Footprint))
    return Footprint(*(np.where(fuller, one, other) for one, other in pairs))


def process(work: Work, kept: Kept, *, first: bool, inside: bool) -> Footprint:
    """Of one process: see `Held.of`."""
    s, c, soft = work.sizes, work.cut, work.software
    held = Held.of(work, first, inside)
    head = Head.of(work, held.table, held.tables)
    head = replace(head, logits=np.where(c.vee, 0.0, head.logits)) if inside else head
    flight = Flight.of(work, held, kept, head, inside)
    leads = (np.where(c.pp > 1, flight.first, 0.0) >= flight.last + head.logits) | first
    activations = np.where(leads | (c.pp == 1), flight.first, flight.last)
    there = np.where(leads & (c.pp > 1), flight.first, flight.last + head.logits) - activations  # of the logits
    weights, gradients, optimizer = states(work, held)
    buckets = (c.zero == 0) & (c.replicas * c.cp > 1)  # are there from the start
    come = (soft.freed > 0) & (work.micro_batches <= 1) & np.logical_not(buckets)
    gradients = np.where(come, np.maximum(0.0, gradients - activations - there), gradients)
    axes = 1.0 * (c.tp > 1) + (c.pp > 1) + (c.cp > 1) + (c.replicas > 1)
    return Footprint(
        weights=weights, gradients=gradients, optimizer=optimizer, gathered=gathered(work, held), activations=activations,
        working=working(work, held, flight, kept, there, head), logits=there, outside=C.outside + C.communicator * axes,
        host=on_host(work, held, flight),
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


def working(work: Work, held: Held, flight: Flight, kept: Kept, logits: Num, head: Head) -> Num:
    """Bytes that a backward pass takes beside what was kept: those of logits, which are gone by then, are there again."""
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
    most = np.maximum(most, (logits > 0) * head.beside)
    # what was put off is made for all blocks of a stage, and then reduced, when what it was made of is gone
    made, done = held.blocks * held.block, flight.delayed * held.blocks / c.vp
    made = np.maximum(c.item * made, np.where(c.zero == 1, 0.0, soft.gradients * made - done))
    made = (c.put_off > 0) * ((c.zero > 0) | (c.away > 0)) * (soft.weights > c.item) * made - flight.released * (c.offload == 0)
    return np.maximum(most + 2 * work.tokens * s.hidden * c.item, made)


def meeting(work: Work) -> Num:
    """Bytes that attention under cp has in a backward pass beside what was kept: keys and values of others as they arrive
    and in order, and the fp32 sums of gradients, which travel too (plan/activations.py counts the same)."""
    c = work.cut
    query, kv = widths(work)
    arriving = np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 6 * kv)
    sums = query + np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 8 * kv)
    ring = c.item * arriving + 4 * sums
    return work.tokens * np.where(c.cp > 1, np.where(c.ulysses > 0, c.item * (query + 2 * kv), ring), 0.0)
