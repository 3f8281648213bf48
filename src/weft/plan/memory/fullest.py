"""The moments of a step that can be the fullest, in closed form: what lies in memory beside weights, their copies and the
optimizer's. Torch-free.

plan/memory/moments.py has the same moments of weft's own steps one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from weft.plan.memory.flight import Flight
from weft.plan.memory.head import Head
from weft.plan.memory.held import Held
from weft.plan.memory.kept import Kept, known
from weft.plan.memory.stage import EXPERT_MATRICES
from weft.plan.work import Num, Work


def fullest(work: Work, held: Held, kept: Kept, flight: Flight, head: Head | None, gradients: Num) -> Num:
    """Bytes of activations, gradients and all that a moment works with. `gradients`: of those, when all are there."""
    c, sums = work.cut, Sums.of(work, held, flight, gradients)
    waiting, head_gradient = (head.waiting, head.gradient) if head else (0.0, 0.0)
    there = flight.ended + waiting + head_gradient
    inside, reduced = backward_of_block(work, held, kept, head)
    moments = [
        # backward of a stage's last block, in the first pass of the step and in the next; and when it is reduced
        there + sums.first + inside,
        there - sums.gone + sums.next + inside + sums.root,
        np.where(
            sums.once,
            flight.one / c.vp * (1 - c.offload) + flight.moving + sums.last,
            there + np.maximum(sums.first, sums.next - sums.gone),
        )
        + reduced,
        # of the last chunk to begin, when all others have gradients and no activations any more
        sums.come * (c.vp > 1) * (flight.kept / c.vp + sums.all + np.maximum(inside + sums.root, reduced)),
        # the end of a pass, and gradients that were put off
        np.maximum(0, flight.kept - flight.one / c.vp) + sums.next + end(work, held),
        np.where(c.put_off > 0, flight.late + sums.next + put_off(work, held, flight), 0.0),
    ]
    if head:
        logits = head.logits - np.minimum(flight.moving / 2, head.logits)  # one block is on its way then, and not two
        sum_ = np.where(sums.come, 0.0, sums.next + sums.root)
        moments.append(flight.kept + waiting + logits + head.beside + sum_)
    return reduce(np.maximum, moments)


@dataclass(frozen=True)
class Sums:
    """Bytes of gradients that are there.

    Attributes:
        come: they come as the activations of the step's first backward pass go, and later passes have fewer of these.
        first, next: in the first backward pass of a step, and in the next; `gone`: activations that they take the place of.
        all: when every chunk has some.
        once: ZeRO-1 reduces in the last pass alone; `last`: what is there then.
        root: what FSDP2 reduced last in the pass before, until it reduces the first block of this one.
    """

    come: Num
    first: Num
    next: Num
    gone: Num
    all: Num
    once: Num
    last: Num
    root: Num

    @classmethod
    def of(cls, work: Work, held: Held, flight: Flight, gradients: Num) -> Sums:
        c, soft, several = work.cut, work.software, work.micro_batches > 1
        buckets = (c.zero == 0) & (c.replicas * c.cp > 1)  # are there from the start
        come = (soft.freed > 0) & (work.micro_batches <= flight.flying) & np.logical_not(buckets)
        gone = come * (1 - c.offload) * flight.one / c.vp * (1 - np.minimum(1, c.vp / held.blocks))
        once = (c.zero == 1) & several
        keeps = known(work) * sharded(work) * several * np.logical_not(once) * soft.reduced
        tables = held.tables / (1 + held.head * c.vee)
        others = keeps * (c.vp - 1) * np.where(held.head & (c.vee > 0), tables, held.common)  # in each chunk
        last = (gradients + (c.vp - 1) * soft.gradients * held.share) / c.vp
        return cls(
            come=come, first=np.where(come, 0.0, gradients), next=np.where(come, gradients / c.vp, gradients + others),
            gone=gone, all=np.where(once, last, gradients + others), once=once, last=last,
            root=keeps * np.where(tables > 0, tables, held.common),
        )  # fmt: skip


def sharded(work: Work) -> Num:
    """Whether FSDP2 has the weights, of weft's: it does so over one process, too, where they lie in the CPU's memory."""
    return (work.cut.zero > 0) | (work.cut.away > 0)


def backward_of_block(work: Work, held: Held, kept: Kept, head: Head | None) -> tuple[Num, Num]:
    """Bytes beside what was kept, in the backward pass of the last block, and when it is done and reduced."""
    c, soft, mine = work.cut, work.software, known(work)
    last = held.chunks[-1 if held.head else 0][1]  # blocks of its stage
    again = (c.full > 0) & ((soft.own_head == 0) | ((last - 1) % c.every == 0) & (last <= c.first))
    redone = np.where(c.full > 0, again * (kept.redone - kept.input), kept.redone + kept.remade)
    messages = (c.pp > 1) * 3 * kept.input
    experts, rest = held.block - held.common, held.common
    inside = kept.inside + c.item * (rest / 4 + experts) + redone + messages
    # its gradients as they came, as they are reduced, and the result; what it kept is gone then. Experts are reduced before
    reduced = (
        (c.item + soft.reduced) * rest + soft.reduced * held.common_share - np.where(again, kept.input, kept.block)
    )
    result = soft.reduced * (held.block_share - held.common_share) + c.item * experts / EXPERT_MATRICES
    dealt = soft.reduced * experts + np.maximum(c.item * experts, result) - (c.zero == 3) * c.item * experts
    reduced = sharded(work) * np.maximum(reduced, dealt + redone - kept.experts) + messages
    if np.all(mine):
        return inside, reduced
    # of other systems, what is inside may lie where the logits were
    plain = kept.redone + np.maximum(head.logits if head else 0.0, kept.inside) + 2 * kept.whole
    return np.where(mine, inside, plain), np.where(mine, reduced, 0.0)


def end(work: Work, held: Held) -> Num:
    """Bytes at the end of weft's backward pass: gradients of the tables, as they came, added up and reduced; of a tied one
    there are two halves. Of what ZeRO-3 gathers the blocks are gone, and after the last pass of the step all that was
    gathered."""
    s, c, soft = work.sizes, work.cut, work.software
    several, tied = work.micro_batches > 1, (s.tied > 0) & (c.pp == 1)
    once = (c.zero == 1) & several
    came = c.item * (held.tables + tied * held.table)
    outlives = (c.zero > 0) * (held.tables > 0) * c.item * held.table  # its copy: one table's gradient as it came
    reduced = np.maximum(came, soft.reduced * held.tables + outlives) + several * soft.reduced * held.tables / c.shards
    gathered = (c.zero == 3) * c.item * (held.block + held.common)
    everything = np.where(c.zero == 3, gathered + c.item * held.tables, c.item * held.whole)
    gathered = np.where(several | (c.vp > 1), gathered, everything)
    there = several | (c.replicas * c.cp > 1)  # to be added to
    added = (held.place == 0) * c.item * held.table * np.where((soft.weights > c.item) & ~there, 1, there + 2 * tied)
    at_end = np.where(sharded(work), np.where(once, came, reduced) - gathered, added)
    return (soft.own_head > 0) * np.maximum(0.0, at_end)


def put_off(work: Work, held: Held, flight: Flight) -> Num:
    """What was put off is made for all blocks of a stage, and then reduced, when what it was made of is gone; where nothing
    is reduced, experts' is added up at once."""
    c, soft = work.cut, work.software
    made, done = held.blocks * held.block, flight.delayed * held.blocks / c.vp
    once = c.item * held.blocks / c.vp * np.where(sharded(work), held.block, held.common)
    ends = held.tables / (1 + c.vee)
    at_once = soft.reduced * np.maximum(held.block, ends) * (1 + held.block_share / held.block)
    unreduced = (c.zero == 1) & (work.micro_batches > 1)
    reduced = at_once + np.where(unreduced, 0.0, soft.reduced * (made + ends)) - done
    apart = (soft.weights > c.item) | (soft.own_head > 0) & sharded(work)  # else they are added up as they are made
    return apart * np.maximum(once, sharded(work) * reduced)
