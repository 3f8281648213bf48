"""Blocks and parameters of one process, in closed form. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weft.plan.time.block import parameters
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Held:
    """Parameters of one process.

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
    def of(cls, work: Work, *, head: bool, first: bool = False) -> Held:
        """`head`: of the process with the head, or of the fullest other: one with most blocks, and where the pipeline goes
        there and back, with neither end; `first`: of the first, where that is another."""
        s, c, soft = work.sizes, work.cut, work.software
        common, experts, table = parameters(work)
        with_head, others = dealt_blocks(work)
        most = np.maximum(with_head, others) - first * (soft.balanced == 0) * work.tables_as_blocks
        own = with_head if head else np.where(others > 0, others, with_head)
        blocks = np.where(soft.own_head > 0, own, most)
        if head:
            fewer = np.where((soft.balanced > 0) & (c.pp > 1), np.clip(s.layers - (c.pp - 1) * most, 1, most), most)
            own = np.where((soft.own_head > 0) | c.vee, own, fewer)
        tables = table * np.where(c.pp > 1, 1.0 + c.vee, 2 - s.tied) + s.positions * s.hidden
        tables = tables if head else np.where(c.vee, 0.0, tables)
        share = (blocks * common + tables) / c.shards + blocks * experts / c.expert_shards
        return cls(
            own if head else blocks,
            common + experts,
            table,
            tables,
            blocks * (common + experts) + tables,
            share,
            c.shards,
        )


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


def low_blocks(work: Work, held: Held) -> tuple[Num, Num]:
    """Of all processes but that with the head: blocks of the late ones; and the place of the last that has one more, as
    many as `held`, or of the last of all, where none has."""
    c = work.cut
    with_head, others = dealt_blocks(work)
    count = np.maximum(1, c.pp - 1)
    more = (work.sizes.layers - with_head) % count
    uneven = (others > 0) & (more > 0)
    return held.blocks - uneven, np.where(uneven, more, count) - 1 + c.vee
