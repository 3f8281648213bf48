"""Bytes of gradients, and of the weights that are computed with, through a backward pass. Torch-free."""

from __future__ import annotations

from operator import sub

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.memory.activations import FLOAT, ITEM
from weft.plan.memory.stage import EXPERT_MATRICES, Stage


class Gradients:
    """Bytes of gradients and of computed-with weights through a backward pass; see parallel/{shard,lowered,replicate}.py.

    Attributes:
        before: at its start: of every one after the first, or under dp of the first too, whose buckets are there from the
            start.
        head: of the head, when it is made; `held_head`: of the head and the norm before it from then on. FSDP2 reduces them
            at the very end, so until then they lie there in the precision of the computation.
        before_last_block: when the blocks but one are done.
        held_root: until the first block of this pass is reduced, FSDP2 keeps what it reduced last in the pass before: the
            gradients of what lies outside of the blocks, or of the first block. So it does in each chunk: those of all
            others are a part of `before`.
        end: with everything reduced; `after`: until the next step.
        end_temporary: what is there for a moment beside them.
        block_inside: of a block, while its backward pass is under way; `block_temporary`: when it is done;
            `experts_temporary`: when its experts' is.
        made: what a stage's products give that were put off; `reduced`: with which a moment later they are reduced.
        copies_outside, copies_inside, copies_at_end: gathered or low-precision weights, outside of a block, inside of one,
            and when all blocks are done; `gathered_ahead`: those of the last block, which FSDP2 asks for before the head's
            gradients are there.
    """

    def __init__(
        self, shape: Shape, layout: Layout, stage: Stage, item: int, num_micro_batches: int, *, first: bool,
        reduces: bool, away: bool, begun: float, over: float, final: bool,
    ) -> None:  # fmt: skip
        """`first`: in the first backward pass of the step. `reduces`: each block's gradients are reduced inside of this
        pass. `away`: what is reduced goes to the CPU's memory, and is not counted here. `begun`, `over`: the shares of
        blocks that have had a backward pass, and their last one. `final`: this one is the process's last of the step."""
        tied = shape.tied and layout.pp == 1
        table = stage.table if stage.last else 0
        part = max(map(len, stage.stages.values())) / stage.num_blocks  # of the blocks, in the largest chunk
        kept = 0 if away else FLOAT  # of a number of this process's share, once it is reduced
        self.after = kept * stage.shard
        self.held_root, self.head = 0, item * table
        if not layout.sharded:
            exist = layout.weight_ways[0] > 1 or not first
            there = layout.expert_ways[0] > 1 or not first  # the gradients of experts, which may have no other copy
            dealt, plain = sum(stage.experts), sum(stage.blocks[1:]) - sum(stage.experts[1:])
            self.before = FLOAT * (exist * (stage.shard - dealt) + there * dealt)
            # what there is already takes the new gradient in
            self.held_head = item * table if tied else FLOAT * table * (not exist)
            self.block_inside, self.block_temporary, self.experts_temporary = item * stage.block // 4, 0, 0
            come = (not exist) * plain + (not there) * sum(stage.experts[1:])
            self.before_last_block = self.before + FLOAT * come
            self.end = self.after
            # the embedding's gradient is as large as the table; a tied one's two halves make a third, their sum. Of lowered
            # ones all three are there before the first in fp32, which is as large as two of them
            tables = 1 if layout.lowered and not exist else exist + 2 * tied
            self.end_temporary = item * stage.table * tables if stage.first else 0
            self.copies_outside = self.copies_inside = item * stage.params if layout.lowered else 0
            self.copies_at_end = self.copies_outside
            self.gathered_ahead = 0
            # of a chunk all are there, in the precision of the computation, before they are added up; experts' never wait
            self.made = self.after - self.before + layout.lowered * int(item * part * (sum(stage.blocks) - dealt))
            self.reduced = 0
            return
        divided = layout.fsdp == 1 and layout.weight_ways[0] > 1  # by one: what FSDP2 makes of adding up over dp alone
        unreduced = layout.zero == 1 and num_micro_batches > 1
        wide = ITEM[layout.gradients]  # of what is added up before it is reduced, and of the reduction
        active = begun - over or 1 / len(stage.stages)  # share of what is still added to
        accumulated = int(wide * stage.params * active) if unreduced else 0
        self.held_head = item * table
        # a block's own gradients, their copies on the way to the reduction, and the result, in fp32 too; experts are a
        # group of their own, of whose own gradients those of one matrix outlive the copy
        result = FLOAT + (wide if wide < FLOAT else 0)
        experts, rest = max(stage.experts), max(map(sub, stage.blocks, stage.experts))
        rest_shard = max(map(sub, stage.block_shards, stage.expert_shards))
        ends = 1 + (stage.first and stage.last and len(stage.stages) > 1)  # of the model, each in a chunk of its own
        kept_groups = 0 if first or unreduced else wide
        self.held_root = kept_groups * (stage.root // ends or rest)
        others = len(stage.stages) - 1
        held_elsewhere = kept_groups * (others and (others - ends + 1) * rest + (ends - 1) * stage.root // ends)
        done = int(over * self.after) + accumulated if unreduced else int(begun * self.after)
        self.before = 0 if first else done + int((begun - over) * held_elsewhere)
        self.block_inside = item * (rest // 4 + experts)
        self.block_temporary = (item + wide) * rest + result * rest_shard + wide * rest * divided
        dealt = max(stage.expert_shards)
        one_matrix = item * experts // EXPERT_MATRICES
        self.experts_temporary = wide * experts + max(item * experts, result * dealt + one_matrix)
        reached = max(begun, 1 / len(stage.stages))
        self.before_last_block = max(self.before, accumulated + int(reached * kept * sum(stage.block_shards[1:])))
        self.end = int(reached * self.after) + int(accumulated and wide * stage.root)
        root_division = wide * stage.root if divided else 0
        root_result = result * stage.root_shard if num_micro_batches > 1 else 0
        alone = layout.fsdp == 1 and layout.weight_ways[0] == 1
        # of what came, one matrix outlives the copy that is reduced
        one_table = item * stage.table * (stage.first or stage.last) * (not alone)
        unreduced_root = max(item * (stage.root + tied * stage.table), wide * stage.root + root_division + one_table)
        self.end_temporary = unreduced_root + root_result
        self.made = int(item * part * sum(stage.blocks))
        groups = ((stage.block, stage.block_shard), (stage.root // ends, stage.root_shard // ends))
        self.reduced = max(wide * whole + (not alone) * result * share for whole, share in groups)
        self.reduced += 0 if unreduced else wide * (sum(stage.blocks) + stage.root // ends)
        if unreduced and reduces:  # the last pass: what was added up goes, block by block
            gone = int(active * wide * sum(stage.blocks[1:]))
            self.before_last_block = accumulated + kept * sum(stage.block_shards[1:]) - gone
            self.end_temporary = wide * stage.root + root_division
        if not reduces:
            self.block_temporary, self.experts_temporary = item * rest if item < wide else 0, 0
            self.before_last_block = (
                self.before if self.before or not unreduced else int(active * wide * sum(stage.blocks[1:]))
            )
            self.end = accumulated or self.before + wide * stage.root
            self.end_temporary = item * (stage.root + tied * stage.table)
        gathered, self.gathered_ahead = item * stage.params, 0
        if layout.fsdp > 1 and layout.zero == 3:
            self.experts_temporary -= item * experts  # gathered ones are given back first
            gathered = item * (stage.root + experts + min(2, stage.num_blocks) * rest)
            self.copies_outside, self.gathered_ahead = item * stage.root, item * rest
        else:
            self.copies_outside = gathered
        self.copies_inside = gathered + (FLOAT * stage.block_shard if away else 0)  # which comes up to be gathered
        self.copies_at_end = 0 if final else self.copies_outside  # what was gathered is given back before it is reduced
