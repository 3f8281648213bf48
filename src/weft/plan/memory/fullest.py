"""The moments of a step that can be the fullest, in closed form: what lies in memory beside weights, their copies and the
optimizer's. Torch-free.

plan/memory/moments.py has the same moments of weft's own steps one by one.
"""

from __future__ import annotations

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
    c, soft, several = work.cut, work.software, work.micro_batches > 1
    # without buckets, which are there from the start, gradients come as activations of a step's first backward pass go, and
    # the next finds them, and fewer activations where no other micro-batch has come
    buckets = (c.zero == 0) & (c.replicas * c.cp > 1)
    come = (soft.freed > 0) & (work.micro_batches <= flight.flying) & np.logical_not(buckets)
    one_pass = (1 - c.offload) * flight.one / c.vp
    gone = one_pass * (1 - np.minimum(1, c.vp / held.blocks))
    before = np.where(come, 0.0, gradients)
    # ZeRO-1 reduces in the last pass alone; else FSDP2 keeps what it reduced last in the pass before, in each chunk
    once = (c.zero == 1) & several
    keeps = known(work) * sharded(work) * several * np.logical_not(once) * soft.reduced
    tables = held.tables / (1 + held.head * c.vee)
    root = keeps * np.where(tables > 0, tables, held.common)
    apart = keeps * (c.vp - 1) * np.where(held.head & (c.vee > 0), tables, held.common)
    # where all chunks are full when the first backward pass begins, gradients come one chunk after the other, and ZeRO-1's
    # go so in any case
    then = np.where(come, gradients / c.vp, gradients + apart)
    last = (gradients + (c.vp - 1) * soft.gradients * held.share) / c.vp
    waiting = head.waiting if head else 0.0
    there = flight.ended + waiting + (head.gradient if head else 0.0)
    inside, reduced = backward_of_block(work, held, kept, head)
    moments = [
        there + before + inside,
        there - come * gone + then + inside + root,
        np.where(once, one_pass + flight.moving + last, there + np.maximum(before, then - come * gone)) + reduced,
        np.maximum(0, flight.kept - one_pass) + then + end(work, held),
        come * (c.vp > 1) * (flight.kept / c.vp + np.where(once, last, gradients + apart) + np.maximum(inside + root, reduced)),
        np.where(c.put_off > 0, flight.late + put_off(work, held, flight) + then, 0.0),
    ]
    if head:
        with_logits = flight.kept + waiting + head.logits - np.minimum(flight.moving / 2, head.logits)
        moments.append(with_logits + np.where(come, 0.0, then + root) + head.beside)
    return reduce(np.maximum, moments)


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
    reduced = (c.item + soft.reduced) * rest + soft.reduced * held.common_share - np.where(again, kept.input, kept.block)
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
    there are two halves. Of what ZeRO-3 gathers the blocks are gone."""
    s, c, soft = work.sizes, work.cut, work.software
    several, tied = work.micro_batches > 1, (s.tied > 0) & (c.pp == 1)
    once = (c.zero == 1) & several
    came = c.item * (held.tables + tied * held.table)
    reduced = np.maximum(came, soft.reduced * held.tables) + several * soft.reduced * held.tables / c.shards
    gathered = (c.zero == 3) * c.item * (held.block + held.common)
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
