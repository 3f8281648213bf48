"""Bytes of gradients, and of the weights that are computed with, through a backward pass. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from operator import sub

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.memory.activations import FLOAT, ITEM
from weft.plan.memory.stage import EXPERT_MATRICES, Stage


@dataclass(frozen=True)
class Turn:
    """Which backward pass of a step it is.

    Attributes:
        first, final: of the step; of this process in the step.
        reduces: each block's gradients are reduced inside of it.
        begun, over: shares of the blocks that have had a backward pass by then, and their last one.
    """

    first: bool
    final: bool
    reduces: bool
    begun: float
    over: float


@dataclass(frozen=True)
class Gradients:
    """Bytes through a backward pass; see parallel/{shard,lowered,replicate}.py.

    Attributes:
        before: at its start: of every one after the first, or under dp of the first too, whose buckets are there from the
            start.
        head: of the head, when it is made; `held_head`: of the head and the norm before it from then on. FSDP2 reduces them
            at the very end, so until then they lie there in the precision of the computation.
        held_root: until the first block of this pass is reduced, FSDP2 keeps what it reduced last in the pass before: the
            gradients of what lies outside of the blocks, or of the first block. So it does in each chunk: those of all
            others are a part of `before`.
        block_inside: of a block, while its backward pass is under way; `block_temporary`: when it is done;
            `experts_temporary`: when its experts' is.
        before_last_block: when the blocks but one are done.
        end: with everything reduced; `after`: until the next step.
        end_temporary: what is there for a moment beside them.
        made: what a stage's products give that were put off; `reduced`: with which a moment later they are reduced.
        copies_outside, copies_inside, copies_at_end: gathered or low-precision weights, outside of a block, inside of one,
            and when all blocks are done; `gathered_ahead`: those of the last block, which FSDP2 asks for before the head's
            gradients are there.
    """

    before: int
    head: int
    held_head: int
    held_root: int
    block_inside: int
    block_temporary: int
    experts_temporary: int
    before_last_block: int
    end: int
    after: int
    end_temporary: int
    made: int
    reduced: int
    copies_outside: int
    copies_inside: int
    copies_at_end: int
    gathered_ahead: int


def gradients_of(
    shape: Shape, layout: Layout, stage: Stage, num_micro_batches: int, turn: Turn, *, away: bool
) -> Gradients:
    """`away`: what is reduced goes to the CPU's memory, and is not counted here."""
    if layout.sharded:
        return _sharded(shape, layout, stage, num_micro_batches, turn, away=away)
    return _whole(shape, layout, stage, turn)


def _whole(shape: Shape, layout: Layout, stage: Stage, turn: Turn) -> Gradients:
    """Each process has all gradients of its weights, in buckets from the start where others have the same weights."""
    item, tied = ITEM[layout.compute], shape.tied and layout.pp == 1
    table = stage.table if stage.last else 0
    exist = layout.weight_ways[0] > 1 or not turn.first
    there = layout.expert_ways[0] > 1 or not turn.first  # the gradients of experts, which may have no other copy
    dealt, dealt_later = sum(stage.experts), sum(stage.experts[1:])
    all_of_them = FLOAT * stage.shard
    before = FLOAT * (exist * (stage.shard - dealt) + there * dealt)
    come = (not exist) * (sum(stage.blocks[1:]) - dealt_later) + (not there) * dealt_later
    # the embedding's gradient is as large as the table; a tied one's two halves make a third, their sum. Of lowered
    # ones all three are there before the first in fp32, which is as large as two of them
    tables = 1 if layout.lowered and not exist else exist + 2 * tied
    # of a chunk all are there, in the precision of the computation, before they are added up; experts' never wait
    chunk = int(item * _largest_chunk(stage) * (sum(stage.blocks) - dealt))
    copies = item * stage.params if layout.lowered else 0
    return Gradients(
        before=before, head=item * table,
        held_head=item * table if tied else FLOAT * table * (not exist),  # what there is already takes the new one in
        held_root=0, block_inside=item * stage.block // 4, block_temporary=0, experts_temporary=0,
        before_last_block=before + FLOAT * come, end=all_of_them, after=all_of_them,
        end_temporary=item * stage.table * tables if stage.first else 0,
        made=all_of_them - before + layout.lowered * chunk, reduced=0,
        copies_outside=copies, copies_inside=copies, copies_at_end=copies, gathered_ahead=0,
    )  # fmt: skip


def _sharded(
    shape: Shape, layout: Layout, stage: Stage, num_micro_batches: int, turn: Turn, *, away: bool
) -> Gradients:
    """FSDP2 reduces group by group: what is outside of the blocks, of each block its experts, and the rest of it."""
    item = ITEM[layout.compute]
    wide = ITEM[layout.gradients]  # of what is added up before it is reduced, and of the reduction
    kept = 0 if away else FLOAT  # of a number of this process's share, once it is reduced
    result = FLOAT + (wide if wide < FLOAT else 0)  # of a reduction, in fp32 too
    alone = layout.fsdp == 1 and layout.weight_ways[0] == 1
    divided = layout.fsdp == 1 and not alone  # by one: what FSDP2 makes of adding up over dp alone
    chunks = len(stage.stages)
    ends = 1 + (stage.first and stage.last and chunks > 1)  # of the model, each in a chunk of its own
    experts, rest = max(stage.experts), max(map(sub, stage.blocks, stage.experts))
    expert_shard, rest_shard = max(stage.expert_shards), max(map(sub, stage.block_shards, stage.expert_shards))
    shards_later, blocks_later = sum(stage.block_shards[1:]), sum(stage.blocks[1:])
    table, tied = stage.table * stage.last, shape.tied and layout.pp == 1

    after = kept * stage.shard
    once = layout.zero == 1 and num_micro_batches > 1  # all passes are added up, and the sum is reduced
    active = turn.begun - turn.over or 1 / chunks  # share of what is still added to
    reached = max(turn.begun, 1 / chunks)
    summed = int(wide * stage.params * active) if once else 0
    # each chunk keeps what it reduced last, until it reduces again
    keeps = 0 if turn.first or once else wide
    elsewhere = keeps * (chunks > 1 and (chunks - ends) * rest + (ends - 1) * stage.root // ends)
    before = 0
    if not turn.first:
        done = summed + int((turn.over if once else turn.begun) * after)
        before = done + int((turn.begun - turn.over) * elsewhere)

    root = item * (stage.root + tied * stage.table)  # what comes of it, of which a tied table gives two
    if turn.reduces:
        # a group's own gradients, their copies on the way to the reduction, and its result; of experts' own, those of one
        # matrix outlive the copy
        block_temporary = (item + wide) * rest + result * rest_shard + wide * rest * divided
        experts_temporary = wide * experts + max(
            item * experts, result * expert_shard + item * experts // EXPERT_MATRICES
        )
        end = int(reached * after) + once * wide * stage.root
        end_temporary = wide * stage.root * (1 + divided)
        if once:  # the last pass: what was added up goes, block by block
            before_last_block = summed + kept * shards_later - int(active * wide * blocks_later)
        else:
            before_last_block = max(before, int(reached * kept * shards_later))
            one_table = item * stage.table * (stage.first or stage.last) * (not alone)
            end_temporary = max(root, end_temporary + one_table) + result * stage.root_shard * (num_micro_batches > 1)
    else:
        block_temporary, experts_temporary = item * rest * (item < wide), 0
        before_last_block = int(active * wide * blocks_later) if once and not before else before
        end = summed or before + wide * stage.root
        end_temporary = root

    # of a stage whose products were put off, all are there; then group after group is reduced
    groups = ((stage.block, stage.block_shard), (stage.root // ends, stage.root_shard // ends))
    reduced = max(wide * whole + (not alone) * result * share for whole, share in groups)
    reduced += 0 if once else wide * (sum(stage.blocks) + stage.root // ends)

    gathered = copies_outside = item * stage.params
    gathered_ahead = 0
    if layout.zero == 3 and layout.fsdp > 1:
        experts_temporary -= item * experts * turn.reduces  # gathered ones are given back first
        gathered = item * (stage.root + experts + min(2, stage.num_blocks) * rest)
        copies_outside, gathered_ahead = item * stage.root, item * rest
    return Gradients(
        before=before, head=item * table, held_head=item * table, held_root=keeps * (stage.root // ends or rest),
        block_inside=item * (rest // 4 + experts), block_temporary=block_temporary, experts_temporary=experts_temporary,
        before_last_block=before_last_block, end=end, after=after, end_temporary=end_temporary,
        made=int(item * _largest_chunk(stage) * sum(stage.blocks)), reduced=reduced, copies_outside=copies_outside,
        copies_inside=gathered + FLOAT * stage.block_shard * away,  # which comes up to be gathered
        copies_at_end=0 if turn.final else copies_outside,  # what was gathered is given back before it is reduced
        gathered_ahead=gathered_ahead,
    )  # fmt: skip


def _largest_chunk(stage: Stage) -> float:
    """Its share of the process's blocks."""
    return max(map(len, stage.stages.values())) / stage.num_blocks
