"""Blocks and parameters of one process, in closed form. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from weft.plan.time.block import parameters
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Held:
    """Parameters of one process.

    Attributes:
        place: in the pipeline, from 0.
        head: whether it has the head.
        blocks: how many it has.
        chunks: its stages: how many have how many blocks, the longest first, and the one with the head last.
        block: parameters of one of them; `common`: without experts; `…_share`: where the replicas share it.
        table: of one of the vocabulary's; `tables`: of all that are no block's.
        whole, share: of all; and of those, where the replicas share them.
    """

    place: Num
    head: bool
    blocks: Num
    chunks: tuple[tuple[Num, Num], ...]
    block: Num
    common: Num
    block_share: Num
    common_share: Num
    table: Num
    tables: Num
    whole: Num
    share: Num


def processes(work: Work, *, first: bool = False) -> Iterator[Held]:
    """Those of a pipeline that can be the fullest: that with the head; of the others the first, with most micro-batches in
    flight, which there and back has neither end; and where gradients of weights are put off, which late ones have most of,
    the last of those with one block more, and of all others. `first`: the first as it is, not one with most blocks."""
    s, c, soft = work.sizes, work.cut, work.software
    common, experts, table = parameters(work)
    shards, dealt = np.where(c.zero > 0, c.shards, 1), np.where(c.zero > 0, c.expert_shards, 1)
    block, block_share = common + experts, common / shards + experts / dealt
    worth = head_as_blocks(work)

    def at(place: Num, blocks: Num, *, head: bool = False, stored: Num | None = None) -> Held:
        """`stored`: blocks whose parameters it has, where those are told as more."""
        # a pipeline's first has one table, its last the other; there and back, one process has both
        ends = np.where(c.pp > 1, 1.0 + c.vee, 2 - s.tied) if head else (place == 0) * 1.0
        stored = blocks if stored is None else stored
        tables = table * ends + (place == 0) * s.positions * s.hidden
        return Held(
            place=place, head=head, blocks=blocks, chunks=dealt_chunks(work, blocks, worth, head=head), block=block,
            common=common, block_share=block_share, common_share=common / shards, table=table, tables=tables,
            whole=stored * block + tables, share=stored * block_share + tables / shards,
        )  # fmt: skip

    with_head, others = dealt_blocks(work, worth)
    most = np.maximum(with_head, others) - first * (soft.balanced == 0) * work.tables_as_blocks
    fewer = np.where((soft.balanced > 0) & (c.pp > 1), np.clip(s.layers - (c.pp - 1) * most, 1, most), most)
    own, stored = np.where((soft.own_head > 0) | c.vee, with_head, fewer), np.where(soft.own_head > 0, with_head, most)
    yield at(np.where(c.vee, 0.0, c.pp - 1), own, head=True, stored=stored)
    if not np.any(c.pp > 1):
        return
    most = np.where((soft.own_head > 0) & (others > 0), others, most)
    yield at(1.0 * c.vee, most)
    if np.any(c.put_off > 0) and not first:
        count = np.maximum(1, c.pp - 1)
        more = np.where(others > 0, (s.layers - with_head) % count, 0)
        # one block more goes to the way there, whose first has it first; on the way back the last
        back = c.vee & (most % 2 == 0) & (more > 0)
        last = c.pp - 1.0 - (c.vee == 0)
        yield at(np.where(back | (more == 0), last, more - 1.0 + c.vee), most)
        yield at(np.where(back, last - more, last), most - (more > 0))


def dealt_chunks(work: Work, blocks: Num, worth: Num, *, head: bool) -> tuple[tuple[Num, Num], ...]:
    """The stages of a process with so many blocks, which have equal work, and the head is work too; other systems' have
    as many blocks each."""
    vp, own = work.cut.vp, work.software.own_head > 0
    last = np.where(own, np.clip(np.floor((blocks + worth) / vp - worth), 1, blocks), blocks / vp) if head else 0.0
    others, count = blocks - last, vp - head
    even = others / np.maximum(1, count)
    longest = np.where(own, np.ceil(even), even)
    longer = others - (longest - 1) * count
    return (longer, longest), (count - longer, longest - 1), (1.0 * head, last)


def head_as_blocks(work: Work) -> Num:
    """Blocks that the head is worth, where it counts as work."""
    s, soft = work.sizes, work.software
    common, experts, _ = parameters(replace(work, cut=replace(work.cut, tp=1, ep=1, etp=1)))
    block = common + experts * s.per_token / np.maximum(1, s.experts)  # what a token is multiplied with
    return np.where(soft.balanced, s.vocab * s.hidden / block, 0.0)


def dealt_blocks(work: Work, head: Num) -> tuple[Num, Num]:
    """Blocks of the process with the head, which is worth so many, and the most of any other."""
    s, c, soft = work.sizes, work.cut, work.software
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
