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
from weft.plan.memory.kept import Kept
from weft.plan.time.block import parameters, widths
from weft.plan.time.imbalance import fullest as fullest_share
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
    # ZeRO-1 reduces in the last pass alone; else FSDP2 keeps what the tables' were reduced from in the pass before
    once = (c.zero == 1) & several
    root = known(work) * sharded(work) * several * np.logical_not(once) * soft.reduced * held.tables
    waiting = head.waiting if head else 0.0
    there = flight.ended + waiting + (head.gradient if head else 0.0)
    inside, reduced = backward_of_block(work, held, kept, head)
    then = np.maximum(before, gradients - come * gone)
    moments = [
        there + before + inside,
        there + gradients - come * gone + inside + root,
        np.where(once, one_pass + flight.moving + gradients, there + then) + reduced,
        np.maximum(0, flight.kept - one_pass) + gradients + end(work, held),
        np.where(c.put_off > 0, flight.late + put_off(work, held, flight) + gradients, 0.0),
    ]
    if head:
        with_logits = flight.kept + waiting + head.logits - np.minimum(flight.moving / 2, head.logits)
        moments.append(with_logits + before + head.beside + np.where(come, 0.0, root))
    return reduce(np.maximum, moments)


def sharded(work: Work) -> Num:
    """Whether FSDP2 has the weights, of weft's: it does so over one process, too, where they lie in the CPU's memory."""
    return (work.cut.zero > 0) | (work.cut.away > 0)


def known(work: Work) -> Num:
    """Whether a backward pass is weft's, or one of FSDP2's."""
    soft = work.software
    return (soft.own_head > 0) | (soft.weights > work.cut.item) & (soft.alternate == 0)


def backward_of_block(work: Work, held: Held, kept: Kept, head: Head | None) -> tuple[Num, Num]:
    """Bytes beside what was kept, in the backward pass of the last block, and when it is done and reduced."""
    s, c, soft, share = work.sizes, work.cut, work.software, work.mixed
    # gradients inside of its MLP or of attention, and those of its weights
    rows = work.tokens * s.per_token * fullest_share(work) / c.tp
    routed = rows * np.maximum((s.matrices - 1) * s.expert_ffn, s.expert_ffn + 2 * s.hidden)
    mlp = (1 - share) * work.tokens * (s.matrices - 1) * s.ffn / c.tp + share * routed
    inside = kept.input + np.maximum(c.item * mlp, meeting(work)) + c.item * held.block / 4
    last = held.chunks[-1 if held.head else 0][1]  # blocks of its stage
    again = (c.full > 0) & ((soft.own_head == 0) | ((last - 1) % c.every == 0) & (last <= c.first))
    redone = np.where(c.full > 0, again * (kept.redone - kept.input), kept.redone + kept.remade)
    messages = (c.pp > 1) * 3 * kept.input
    # its gradients as they came, as they are reduced, and the result; what it kept is gone then
    reduced = (c.item + soft.reduced) * held.block + soft.reduced * held.block_share
    reduced = sharded(work) * (reduced - np.where(again, kept.input, kept.block))
    # other systems
    inner = (1 - share) * s.ffn / c.tp + share * (rows / work.tokens * s.expert_ffn + s.shared_ffn / c.tp)
    inner = c.item * work.tokens * (s.matrices * inner + 2 * s.hidden)
    inner = np.maximum(inner, 2 * c.item * work.tokens * s.hidden + meeting(work))
    logits = head.logits if head else 0.0
    plain = kept.redone + np.maximum(logits, inner) + 2 * c.item * work.tokens * s.hidden
    return np.where(known(work), inside + redone + messages, plain), np.where(known(work), reduced + messages, 0.0)


def end(work: Work, held: Held) -> Num:
    """Bytes at the end of weft's backward pass: gradients of the tables, as they came, added up and reduced; of a tied one
    there are two halves. Of what ZeRO-3 gathers the blocks are gone."""
    s, c, soft = work.sizes, work.cut, work.software
    several, tied = work.micro_batches > 1, (s.tied > 0) & (c.pp == 1)
    once = (c.zero == 1) & several
    came = c.item * (held.tables + tied * held.table)
    reduced = np.maximum(came, soft.reduced * held.tables) + several * soft.reduced * held.tables / c.shards
    gathered = (c.zero == 3) * 2 * c.item * held.block
    there = several | (c.replicas * c.cp > 1)  # to be added to
    added = (held.place == 0) * c.item * held.table * np.where((soft.weights > c.item) & ~there, 1, there + 2 * tied)
    at_end = np.where(sharded(work), np.where(once, came, reduced) - gathered, added)
    return (soft.own_head > 0) * np.maximum(0.0, at_end)


def put_off(work: Work, held: Held, flight: Flight) -> Num:
    """What was put off is made for all blocks of a stage, and then reduced, when what it was made of is gone; where nothing
    is reduced, experts' is added up at once."""
    c, soft = work.cut, work.software
    made, done = held.blocks * held.block, flight.delayed * held.blocks / c.vp
    once = c.item * held.blocks / c.vp * np.where(sharded(work), held.block, parameters(work)[0])
    ends = held.tables / (1 + c.vee)
    at_once = soft.reduced * np.maximum(held.block, ends) * (1 + held.block_share / held.block)
    unreduced = (c.zero == 1) & (work.micro_batches > 1)
    reduced = at_once + np.where(unreduced, 0.0, soft.reduced * (made + ends)) - done
    return (soft.weights > c.item) * np.maximum(once, sharded(work) * reduced)


def meeting(work: Work) -> Num:
    """Bytes that attention under cp has in a backward pass beside what was kept: keys and values of others as they arrive
    and in order, and the fp32 sums of gradients, which travel too (plan/memory/activations.py counts the same)."""
    c = work.cut
    query, kv = widths(work)
    arriving = np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 6 * kv)
    sums = query + np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 8 * kv)
    ring = c.item * arriving + 4 * sums
    return work.tokens * np.where(c.cp > 1, np.where(c.ulysses > 0, c.item * (query + 2 * kv), ring), 0.0)
