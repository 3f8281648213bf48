"""The memory of one process of a layout, in bytes, at the moment of a step when it is fullest. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from weft.config.layout import Layout
from weft.config.recompute import Recompute
from weft.config.tree import Config
from weft.plan.memory.activations import FLOAT, ITEM, LONG, Pass
from weft.plan.memory.gradients import Gradients, Turn, gradients_of
from weft.plan.memory.logits import loss_workspace, rounded_head
from weft.plan.memory.passes import When, backward_shares, in_flight, kept_bytes, stage_bytes
from weft.plan.memory.stage import Stage, stages
from weft.schedules.table import Held, Schedule
from weft.units import gibibytes

Device = Literal["cpu", "cuda"]

BASE: dict[Device, int] = {"cpu": 330 * 2**20, "cuda": 512 * 2**20}
"""What a process takes before it holds a tensor. cpu: interpreter, torch and weft, measured as resident (torch 2.13,
Linux: 219 MiB after importing torch, 281 with the trainer, 325 after steps of a model of 1 MiB, in bf16 340). cuda: a
context with its kernels and libraries as NVIDIA's tools show it, about; no part of what torch reports as allocated."""


MUON_AT_ONCE = 4
"""Matrices that one process works on at once: train/muon.py."""
EIGHT_BIT_BLOCK, EIGHT_BIT_AT_ONCE = 256, 2**22
"""Numbers that share a scale, and those whose update is worked out at once: train/eightbit.py."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, at one moment of a step.

    Attributes:
        weights: fp32, this process's share.
        optimizer: both moments of AdamW, fp32 or of 8 bits, or the momentum of Muon's matrices, fp32.
        gradients: those that exist at this moment; fp32, and what a sharded layout has not yet reduced, in its precision.
        copies: gathered or low-precision weights that the computation reads.
        activations: kept for backward, of every micro-batch in flight; what passes between stages; the tokens.
        logits: of every micro-batch in flight, with the workspace of the loss; where they are never whole, in their
            place the gradient of the head.
        temporary: what the operations of this moment need beside that.
        staging: of checkpoints written in the background: memory of the CPU, whatever the device.
        base: the process itself.
    """

    moment: str
    weights: int
    optimizer: int
    gradients: int = 0
    copies: int = 0
    activations: int = 0
    logits: int = 0
    temporary: int = 0
    staging: int = 0
    base: int = 0

    @property
    def total(self) -> int:
        return self.tensors + self.staging + self.base

    @property
    def tensors(self) -> int:
        """On a GPU: what `torch.cuda.max_memory_allocated` counts."""
        return sum(getattr(self, name) for name in TENSORS)


TENSORS = ("weights", "optimizer", "gradients", "copies", "activations", "logits", "temporary")


@dataclass(frozen=True)
class StageMemory:
    """The fullest moment of a process of one stage, and all the moments that were looked at."""

    stage: Stage
    peak: Memory
    moments: tuple[Memory, ...]


def layout_memory(config: Config, device: Device = "cpu") -> list[StageMemory]:
    """Of each pipeline stage, the process that holds most. Every other process of the stage holds as much or less.

    Args:
        device: where the tensors lie. On a CPU the staging buffers of checkpoints come on top of them.
    """
    return [stage_memory(config, stage, device) for stage in stages(config.model, config.layout)]


def stage_memory(config: Config, stage: Stage, device: Device = "cpu") -> StageMemory:
    """The memory of the first process of one stage."""
    config = fitted(config, stage, device)
    layout = config.layout
    micro_batch = layout.micro_batch_size(config.train.global_batch)
    passed = Pass.of(config.model, layout, micro_batch, config.seq, config.data.document_mask, stage.indices, device)
    num_micro_batches = layout.num_micro_batches(config.train.global_batch)
    found = _moments(config, stage, passed, num_micro_batches, device)
    staging = staging_bytes(config, stage)
    often = staging if config.checkpoint.every else 0  # the buffers stay once they are made
    found = [replace(moment, staging=often, base=BASE[device]) for moment in found]
    found.append(replace(found[-1], moment="saving a checkpoint", staging=staging, temporary=0))
    size = (lambda memory: memory.total) if device == "cpu" else (lambda memory: memory.tensors)
    return StageMemory(stage, max(found, key=size), tuple(found))


def fitted(config: Config, stage: Stage, device: Device) -> Config:
    """With a budget of memory made the fewest blocks of this stage whose recomputation keeps within it.

    Raises:
        ValueError: not all of them are enough.
    """
    budget = Recompute.parse(config.layout.recompute).budget
    if budget is None:
        return config
    needed = 0
    for count in range(stage.num_blocks + 1):
        layout = config.layout.model_copy(update={"recompute": f"full:{count}" if count else "none"})
        peak = stage_memory(found := config.model_copy(update={"layout": layout}), stage, device).peak
        needed = peak.total if device == "cpu" else peak.total - peak.staging
        if needed <= budget:
            return found
    raise ValueError(
        f"layout.recompute = {config.layout.recompute}: with every block of stage {stage.index} recomputed a process still "
        f"takes {gibibytes(needed)}. Raise it, or cut the model or its batch in more ways"
    )


def settled(config: Config, device: Device) -> Layout:
    """The layout of a run, with a budget of memory made as many full blocks of every stage as its fullest stage needs.

    Raises:
        ValueError: not all of them are enough.
    """
    needed = (fitted(config, stage, device).layout for stage in stages(config.model, config.layout))
    return max(needed, key=lambda layout: Recompute.parse(layout.recompute).first or 0)


def largest(memories: list[StageMemory]) -> StageMemory:
    return max(memories, key=lambda memory: memory.peak.total)


def staging_bytes(config: Config, stage: Stage) -> int:
    """CPU memory of the copies that an asynchronous checkpoint is written from: weights and moments, fp32."""
    return FLOAT * (stage.shard + moments(config, stage)) if config.checkpoint.asynchronous else 0


def moments(config: Config, stage: Stage) -> int:
    """Numbers that the optimizer keeps."""
    return 2 * stage.shard - (stage.muon_shard if config.optimizer.kind == "muon" else 0)


def optimizer_bytes(config: Config, stage: Stage, device: Device) -> int:
    """Its moments. Offloaded, those of AdamW lie with copies of weights and gradients in the CPU's memory."""
    by_adamw = moments(config, stage) - stage.shard
    if config.optimizer.states == "8bit":
        coarse, muon = by_adamw - stage.vector_shard, stage.shard - by_adamw
        return FLOAT * (muon + 2 * stage.vector_shard) + 2 * (coarse + FLOAT * coarse // EIGHT_BIT_BLOCK)
    if not config.layout.offload_optimizer:
        return FLOAT * moments(config, stage)
    return FLOAT * (stage.shard - by_adamw + (4 * by_adamw if device == "cpu" else 0))


def muon_numbers(stage: Stage, processes: int) -> int:
    """Numbers that Muon works with while it makes the largest matrices orthogonal: train/muon.py."""
    whole = sum(numbers * count for numbers, count in stage.matrices.items())
    most = 0
    for numbers, count in stage.matrices.items():
        owned = min(MUON_AT_ONCE, -(-count // processes)) * numbers
        shares = min(MUON_AT_ONCE * processes, count) * numbers * stage.muon_shard // whole
        most = max(most, 5 * owned + 4 * shares)  # matrices and the iteration's products; directions, messages, results
    return most


def _moments(config: Config, stage: Stage, one: Pass, num_micro_batches: int, device: Device) -> list[Memory]:
    """The moments of a step that can be the fullest: for each, everything that is there."""
    layout = config.layout
    schedule = layout.table(num_micro_batches)
    logits = 0
    if stage.last:
        logits = one.logits if layout.loss == "whole" else ITEM[layout.compute] * stage.table
    tokens = 2 * LONG * one.tokens * num_micro_batches  # and their targets
    away = layout.offload_weights and device == "cuda"
    fixed = Memory("", 0, 0) if away else Memory("", FLOAT * stage.shard, optimizer_bytes(config, stage, device))
    # until a backward pass has ended there are no gradients beside the activations; ZeRO-1 reduces in the last alone
    whens: tuple[When, ...] = ("later", "first", "last") if num_micro_batches > 1 else ("first",)
    sums = (ITEM[layout.gradients] * stage.params if layout.zero == 1 else FLOAT * stage.shard, FLOAT * stage.shard)
    found = []
    for when in whens:
        flying = in_flight(schedule, stage, one, logits, when, sums)
        begun, over = backward_shares(flying, schedule, stage)
        reduces = not schedule.splits and (layout.zero > 1 or when == "last" or num_micro_batches == 1)
        final = when == "last" or (num_micro_batches == 1 and len(stage.stages) == 1)
        turn = Turn(first=when == "first", final=final, reduces=reduces, begun=begun, over=over)
        gradients = gradients_of(config.model, layout, stage, num_micro_batches, turn, away=away)
        found += _pass(
            replace(fixed, activations=tokens), config, stage, one, schedule, flying, gradients, logits, device
        )
    if schedule.splits:
        flying = in_flight(schedule, stage, one, logits, "put off")
        kept = tokens + kept_bytes(flying, schedule, stage, one, logits) + 3 * one.hidden
        done = len(stage.stages[max(flying.put_off, key=lambda number: flying.put_off[number])]) * one.put_off
        late = replace(fixed, gradients=gradients.before, copies=gradients.copies_outside)
        late = replace(late, moment="gradients that were put off", activations=kept, temporary=gradients.made)
        found.append(late)
        moment = f"reduction of {late.moment}"
        found.append(replace(late, moment=moment, activations=kept - done, temporary=gradients.reduced))
    update = FLOAT * muon_numbers(stage, layout.world // layout.pp) if config.optimizer.kind == "muon" else 0
    if config.optimizer.states == "8bit":
        update = max(update, 6 * FLOAT * min(EIGHT_BIT_AT_ONCE, stage.shard))
    found.append(replace(fixed, moment="update", gradients=gradients.after, activations=tokens, temporary=update))
    return found


def _pass(
    fixed: Memory, config: Config, stage: Stage, one: Pass, schedule: Schedule, flying: Held, gradients: Gradients,
    logits: int, device: Device,
) -> list[Memory]:  # fmt: skip
    """The moments from the end of a forward pass to that of its backward pass, with `flying` micro-batches there."""
    layout = config.layout
    messages = 3 * one.hidden if layout.pp > 1 else 0  # the next to come in, one on its way each way
    top = one.last if stage.last else 0
    # whose backward pass is looked at: the last stage's where there is one, which has most; else that of most blocks
    current = schedule.num_stages - 1 if stage.last else max(stage.stages, key=lambda number: len(stage.stages[number]))
    other_logits = max(0, flying.forward.get(schedule.num_stages - 1, 0) - 1) * logits
    kept = kept_bytes(flying, schedule, stage, one, logits) - stage_bytes(current, schedule, stage, one)
    others = max(0, kept - logits - other_logits) + messages + fixed.activations
    num_blocks = len(stage.stages[current])
    edge = 0 if stage.last else one.hidden
    # products that wait for their own time keep what they are made of, and their gradients are not there yet
    always = all((current, index) in schedule.put_off for index in range(schedule.num_micro_batches))
    put_off = always * one.put_off

    found = []
    if stage.last:
        loss = replace(
            fixed,
            moment="end of the forward pass",
            gradients=gradients.before + gradients.held_root,
            copies=gradients.copies_outside,
            activations=others + one.blocks(num_blocks) + top,
            logits=other_logits + logits + loss_workspace(one, device, stage.table),
            temporary=one.moving // 2,
        )
        found.append(loss)
    if stage.last and layout.loss == "whole":  # else it has been done in the forward pass
        found.append(
            replace(
                loss,
                moment="backward of the head",
                gradients=gradients.before + gradients.head + gradients.held_root,
                copies=gradients.copies_outside + gradients.gathered_ahead,
                logits=other_logits + logits,
                temporary=one.whole + rounded_head(one, device, stage.table),
            )
        )
    again = one.recompute.blocks(num_blocks)
    for index in sorted({num_blocks - 1, *again[-1:], 0}, reverse=True):
        done = (num_blocks - 1 - index) / max(1, num_blocks - 1)
        accumulated = gradients.before + int(done * (gradients.before_last_block - gradients.before))
        # its gradients are reduced when what it keeps is gone; the first takes the place of what FSDP2 has kept
        gone = one.blocks(num_blocks, index + 1) - one.blocks(num_blocks, index)
        reduced = 0 if put_off else gradients.block_temporary - gone
        again_here = one.recomputed * (index in again)
        if gradients.experts_temporary and one.experts and not put_off:
            reduced = max(reduced, gradients.experts_temporary + again_here - one.inside(one.experts))
        inside = one.backward + gradients.block_inside * (not put_off)
        inside += gradients.held_root if index == num_blocks - 1 else 0
        found.append(
            replace(
                fixed,
                moment=f"backward of {_ordinal(index, num_blocks)} block",
                gradients=accumulated + gradients.held_head,
                copies=gradients.copies_inside,
                activations=others + one.blocks(num_blocks, index + 1) + edge + (num_blocks - 1 - index) * put_off,
                logits=other_logits,
                temporary=one.moving + max(again_here + inside, reduced),
            )
        )
    found.append(
        replace(
            fixed,
            moment="end of the backward pass",
            gradients=gradients.end,
            copies=gradients.copies_at_end,
            activations=others + edge + one.hidden + num_blocks * put_off,
            logits=other_logits,
            temporary=gradients.end_temporary,
        )
    )
    return found


def _ordinal(index: int, count: int) -> str:
    return {0: "the first", count - 1: "the last"}.get(index, "the last recomputed")


NAMES = tuple(field.name for field in fields(Memory) if field.name != "moment")
