"""Micro-batches in flight, and what they keep on one process, in closed form. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.plan.columns import chosen
from weft.plan.memory.held import Held
from weft.plan.memory.kept import Kept
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Flight:
    """Activations of the micro-batches in flight, in bytes.

    Attributes:
        flying: micro-batches in flight.
        one: of one of them, what all blocks of the process keep.
        kept: of all of them, when a backward pass begins and most is kept; `ended`: when it ends; `late`: when most of it
            waits for gradients of weights that are put off.
        moving: of what goes to the CPU, that of the blocks at work.
        delayed: by one block of one micro-batch that waits.
    """

    flying: Num
    one: Num
    kept: Num
    ended: Num
    late: Num
    moving: Num
    delayed: Num

    @classmethod
    def of(cls, work: Work, held: Held, kept: Kept) -> Flight:
        c, chunks = work.cut, Chunks.of(work, held, kept)
        flying, early, left, waiting = in_flight(work, held, chunks)
        splits, mean, delayed = c.put_off > 0, chunks.all / held.blocks, held.blocks * kept.delayed
        ends = splits & (c.vp == 1)  # a pass leaves all that waits, there and back half of it
        begin = np.maximum(early, splits * (left * chunks.all + waiting * delayed))
        late = left * chunks.all + waiting * delayed + ends * np.maximum(0, delayed - chunks.all)
        late = np.where(c.vee, np.maximum(late, (np.minimum(flying, c.pp) - 0.5) * chunks.all + delayed / 2), late)
        found = cls(flying, chunks.all, begin, np.maximum(begin, splits * late), late, 0.0, kept.delayed)
        if not np.any(c.offload > 0):
            return found
        # a share that goes is that of the first blocks (Transformer Engine's), which are gone when the last are there
        stays, here = (1 - c.offload) * begin, waiting * delayed + flying * c.vp * chunks.sent
        moving = np.minimum(2, flying * held.blocks) * mean
        kept_here, end = np.maximum(stays, here + moving), ends * delayed
        away = cls(
            flying, chunks.all, kept_here, kept_here + end, here + end, moving * (stays <= here + moving), kept.delayed
        )
        return chosen(c.offload > 0, away, found)


@dataclass(frozen=True)
class Chunks:
    """What one micro-batch leaves behind, in bytes.

    Attributes:
        all: in all chunks of the process; `last`: in that with the head.
        middle: in that which has as many before it as behind it, of longer and shorter ones; `uneven`: what the former
            have more than the latter.
        sent: of each, what its stage gave.
    """

    all: Num
    last: Num
    middle: Num
    uneven: Num
    sent: Num

    @classmethod
    def of(cls, work: Work, held: Held, kept: Kept) -> Chunks:
        c, soft = work.cut, work.software
        sent = soft.results * (c.pp > 1) * kept.input  # weft keeps it, the root of a stage's backward pass

        def of(blocks: Num) -> Num:
            again = np.where(soft.own_head > 0, np.ceil(np.minimum(blocks, c.first) / c.every), c.full * blocks)
            again = (c.full > 0) * again
            return again * kept.input + (blocks - again) * kept.block + sent

        sizes = [of(blocks) for _, blocks in held.chunks]
        whole = sum(count * size for (count, _), size in zip(held.chunks, sizes, strict=True))
        (longer, _), (shorter, _), _ = held.chunks
        long, short, last = sizes
        return cls(
            whole, last, np.where(longer > shorter, long, short), np.minimum(longer, shorter) * (long - short), sent
        )


def in_flight(work: Work, held: Held, chunks: Chunks) -> tuple[Num, Num, Num, Num]:
    """Micro-batches in flight, and what they keep; and those that are when most have gradients that wait, and these."""
    c, count, blocks, place = work.cut, work.micro_batches, held.blocks, held.place
    # the first of a pipeline has most in flight, the last least; there and back it is the other way round, until the first
    # micro-batch has come back
    most = np.minimum(count, c.flying)
    along = np.minimum(count, np.maximum(1, c.flying - place))
    flying = np.where(c.vee, np.minimum(most, (count + 1 + place) / 2), along)
    # and gives up what it has for gradients that wait, or half of them do
    behind, share = np.minimum(most, place + 0.5), c.put_off / (c.pp - 0.5)
    waiting = np.where(c.vee, share * behind, (c.put_off > 0) * (most - along))
    left = np.where(c.vee, share * np.maximum(0, most - 0.5 - behind), along)
    # there they are early and many in flight, back they are late: an odd block is there
    odd = c.vee * (blocks % 2) * np.maximum(0.0, 1 - np.where(place > 0, 3, 1) / flying)
    early = (1 + odd / blocks) * flying * chunks.all
    # in loops, a round of micro-batches is in each chunk; another begins in the first, or one ends in the last; halfway the
    # first ones have two and the last none
    full_round = np.minimum(count, c.pp)
    begun = np.minimum(count, 2 * c.pp - 1) - full_round
    ending = np.where(work.software.own_head > 0, chunks.last, chunks.all)
    both = full_round * (chunks.all + (count >= 2 * c.pp) * chunks.uneven)
    loop = both + ((1 - full_round) * ending if held.head else begun * chunks.middle)
    looped = (c.vp > 1) & np.logical_not(c.vee) & np.isfinite(c.flying)
    return (
        np.where(looped, np.maximum(full_round, loop / chunks.all), flying),
        np.where(looped, loop, early),
        left,
        waiting,
    )
