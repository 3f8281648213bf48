"""How long a step of training takes, by what takes it. Torch-free.

One micro-batch is timed on the process that has most to do: kernel by kernel, then what the messages add, then the
pipeline and the update around it. Every function takes one Work or columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from weft.plan.memory.kept import block_activations
from weft.plan.time import collectives
from weft.plan.time.block import Passes, parameters
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.copies import copies
from weft.plan.time.replicas import replica_messages
from weft.plan.time.shards import shard_messages
from weft.plan.work import Num, Work

ADAM = 28
"""Bytes that an update moves for each parameter: gradient, weight and moments read, all but the gradient written."""

SIMPLE = ("matmul", "attention", "elementwise", "tp", "cp", "ep")
"""Of `Time`: what each pass through each block takes, added up."""


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by what takes them; they add up.

    Attributes:
        matmul, attention, elementwise: of all micro-batches, on the process with most blocks.
        head: the logits and the loss, where they are on the slowest process.
        recompute: what is computed again.
        launch: the GPU waits for the CPU to launch kernels.
        tp, cp, ep, dp, pp: messages that nothing hides.
        bubble: the pipeline fills and drains.
        optimizer: the update, and where gradients are added up apart, that.
        rest: data, logging, stragglers.
        offload: activations, or weights and gradients, on their way to the CPU and back.
        mixed: share of the blocks that have experts; no part of `total`.
    """

    matmul: Num
    attention: Num
    elementwise: Num
    head: Num
    recompute: Num
    launch: Num
    tp: Num
    cp: Num
    ep: Num
    dp: Num
    pp: Num
    bubble: Num
    optimizer: Num
    rest: Num
    offload: Num = 0.0
    mixed: Num = 0.0

    @property
    def total(self) -> Num:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def spread(self) -> Num:
        """How near this is: four of five published runs that no constant was fitted to are within this share of the total
        (docs/accuracy.md). Waiting is known worse than work, and a mixture worse than a dense model."""
        waiting = sum(getattr(self, part) for part in WAITING)
        return 0.12 + 0.12 * (self.mixed > 0) + 0.45 * np.maximum(0.0, waiting / self.total - 0.25)


PARTS = tuple(field.name for field in fields(Time) if field.name != "mixed")
"""Of `Time`: what adds up to a step."""
WAITING = ("launch", "tp", "cp", "ep", "dp", "pp", "bubble", "offload", "rest")
"""Of these: what is no work of the GPU's."""


def step_time(work: Work, passes: Passes | None = None) -> Time:
    """`passes`: where they are known already."""
    passes = passes or Passes.of(work)
    beat = Beat.of(work, passes)
    stages = stage_times(work, beat, passes.head, late_products(work, passes))
    optimizer, copied = update_time(work)
    every = work.micro_batches * work.blocks  # blocks' passes in a step
    both = {name: every * (passes.mean(name, 0, work) + passes.mean(name, 1, work)) for name in SIMPLE}
    parts = Time(
        **both, head=stages.head, recompute=every * beat.redo, launch=stages.launch, pp=stages.pp, bubble=stages.bubble,
        dp=replica_messages(work, beat.spans) + every * sum(beat.fsdp), optimizer=optimizer, rest=0.0,
        offload=every * sum(beat.offload) + weights_carried(work, beat) + copied, mixed=work.mixed,
    )  # fmt: skip
    slow = C.straggle * np.log2(np.maximum(1.0, work.cut.gpus / 8))
    return replace(parts, rest=C.step + slow * parts.total)


@dataclass(frozen=True)
class Beat:
    """Seconds of one micro-batch in a block, the mean of those with experts and those without; of pairs, forward and
    backward.

    Attributes:
        busy: of the GPU, backward with what is computed again.
        redo: what is computed again.
        fsdp: ZeRO-3's messages, as far as nothing hides them.
        offload: activations on their way to the CPU and back, as far as neither that nor the computation hides them.
        launched: that the CPU takes to launch all that.
        waits: whether each launch waits for the kernel before.
    """

    busy: tuple[Num, Num]
    redo: Num
    fsdp: tuple[Num, Num]
    offload: tuple[Num, Num]
    launched: Num
    waits: Num

    @classmethod
    def of(cls, work: Work, passes: Passes) -> Beat:
        c, soft = work.cut, work.software

        def mean(name: str, way: int) -> Num:
            return passes.mean(name, way, work)

        forward, backward = (sum(mean(name, way) for name in SIMPLE) for way in (0, 1))
        cheap = mean("elementwise", 0) - mean("routing", 0)  # nobody deals tokens out again
        selective = c.selective * np.where(soft.flash > 0, cheap, mean("attention", 0))
        selective = selective + c.selective * (soft.alternate / 2 + remade_share(work)) * mean("matmul", 0)
        selective = selective + c.selective * (soft.remakes > 1) * mean("attention", 0)
        redo = c.full * (forward - soft.stops * mean("results", 1)) + selective
        for part, share in enumerate((c.redo_attention, c.redo_mlp, c.redo_experts)):
            redo = redo + share * (mean("parts", part) - soft.stops * mean("results", part))
        busy = (forward, backward + redo)
        again = c.full + (c.redo_attention + c.redo_mlp + c.redo_experts) / 2
        launched = C.host * (mean("kernels", 0) * (1 + again) + mean("kernels", 1)) + soft.tp_host * (c.tp > 1)
        least = soft.least * (1 + again / (1 + C.backward_kernels)) * np.where(soft.graphs > 0, C.graph, 1.0)
        launched = np.maximum(launched, least)
        fsdp = shard_messages(work, busy)
        # what a block keeps goes to the CPU while it computes forward, and comes back while it computes backward
        moved = c.offload * block_activations(work) * (1 - c.full) / work.machine.host
        down, up = (np.maximum(0.0, moved - time - shown) for time, shown in zip(busy, fsdp, strict=True))
        return cls(busy, redo, fsdp, (down, up), launched, soft.waits)

    @property
    def ways(self) -> tuple[Num, Num]:
        """Of the GPU, with what it waits for."""
        forward, backward = (sum(parts) for parts in zip(self.busy, self.fsdp, self.offload, strict=True))
        return forward, backward

    @property
    def gpu(self) -> Num:
        return sum(self.ways)

    @property
    def spans(self) -> tuple[Num, Num]:
        """In which other messages may go: while a block is computed, and while the GPU waits for what is no message."""
        forward, backward = (
            time + offload + self.late * way / self.gpu
            for time, offload, way in zip(self.busy, self.offload, self.ways, strict=True)
        )
        return forward, backward

    @property
    def late(self) -> Num:
        """The GPU waits for the CPU."""
        return np.where(self.waits, C.blocked * self.launched, np.maximum(0.0, self.launched - self.gpu))


def remade_share(work: Work) -> Num:
    """Of a block's products, forward: those that `remakes` says are done again."""
    s, soft = work.sizes, work.software
    inner = (soft.remakes > 0) * (s.matrices - 1) * s.ffn + (soft.remakes > 2) * s.heads * s.values
    return inner * s.hidden / work.cut.tp / parameters(work)[0]


class Stages(NamedTuple):
    """Seconds of a step that the pipeline adds, and those that depend on which process is slowest: as `Time` has them."""

    head: Num
    pp: Num
    bubble: Num
    launch: Num


def late_products(work: Work, passes: Passes) -> Num:
    """Seconds of one micro-batch in a block that gradients of weights take where they can be put off: not experts'."""
    s, common = work.sizes, parameters(work)[0]
    routed = work.mixed * 3 * s.hidden * s.expert_ffn * s.per_token / work.cut.tp
    return passes.mean("matmul", 0, work) * common / (common + routed)


def stage_times(work: Work, beat: Beat, head: Num, late: Num) -> Stages:
    """`head`: seconds of the logits and their loss, of one micro-batch; `late`: of gradients of weights, in a block."""
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    blocks, count, piped = work.blocks, work.micro_batches, c.pp > 1
    # interleaved, a process has another chunk's work while a message is on its way; else each waits for its neighbour
    hidden = soft.overlap_pp * (c.vp > 1)
    blocking = np.maximum(np.where(soft.overlap_pp > hidden, 1.0, soft.blocking), soft.waits)
    per_block = beat.gpu + blocking * beat.late
    # the last process has the head too; where stages cannot be cut finer, it is the slowest
    spare = np.where(piped, np.where(work.tables_as_blocks, C.spare, blocks - s.layers / c.pp), 0.0) * per_block
    slowest = np.where(piped, np.maximum(0.0, head - spare), head)
    dealt = evened(work, head / (beat.busy[0] + beat.busy[1] - beat.redo))  # by what they compute, once
    even = dealt * per_block
    slowest = np.where((soft.balanced > 0) & piped, np.maximum(head, even) - blocks * per_block, slowest)
    sent = work.tokens * s.hidden * c.item / np.where(soft.whole_pp, 1, c.tp)
    flow = collectives.send(c.tp * c.cp * c.dp * c.fsdp, chip, sent)
    shown = np.where(hidden, C.pp_exposed * 0.4, C.pp_exposed)
    # while it fills, each loop waits for the first micro-batch, but where a loop has more of them than there are processes
    loops = np.where((c.flying < np.inf) | (count <= c.pp), c.vp, 1)
    pp = np.where(piped, 2 * flow * (count * c.vp * shown + c.pp * loops - 1), 0.0)
    mean = (s.layers * per_block + head) / c.pp
    forward, weights = mean * beat.ways[0] / beat.gpu, late * s.layers / c.pp
    bubble = np.where(piped, waiting(work, forward, np.maximum(0.0, mean - forward - weights), weights), 0.0)
    # a CPU that does not wait for messages of stages goes on launching: it is late where all of its work takes longer
    most = np.where((soft.balanced > 0) & piped, np.minimum(s.layers, dealt), blocks)
    ahead = np.maximum(0.0, count * (most * beat.launched - blocks * beat.gpu) - pp - bubble)
    launch = np.where(blocking, count * blocks * beat.late, ahead)
    return Stages(count * slowest, pp + count * soft.stall * np.minimum(2, c.pp - 1), bubble, launch)


def waiting(work: Work, forward: Num, inputs: Num, weights: Num) -> Num:
    """Seconds that a process waits while its pipeline fills and drains. Of one micro-batch, in all of a process's stages:
    `forward`, and backward the gradients of `inputs` and of `weights`.

    What the orders of schedules/orders.py take where all stages are alike (schedules/timeline.py): loops wait for others'
    passes, and again after each loop where there are fewer micro-batches than processes; ZB-H1 has its own gradients of
    weights to do while it waits (Qi et al. 2023, 2). In a V one process has both ends: it waits for the slowest of forward,
    inputs and weights; but with fewer than twice as many micro-batches as processes, for the first one to come back.
    """
    c, count, ends = work.cut, work.micro_batches, work.cut.pp - 1
    absent, short = np.maximum(0, c.pp - count), np.maximum(0, 2 * c.pp - 1 - count)
    loops = (ends + (c.vp - 1) * absent) * (forward + inputs + weights) / c.vp
    alone = ends * (forward + inputs - weights)
    slowest = ends * np.maximum(inputs, 2 * forward - inputs)
    slowest = np.maximum(slowest, 2 * (absent * forward + ends * inputs - np.minimum(count - 1, ends) * weights))
    back = short * forward + np.maximum(ends * weights, 2 * absent * inputs)
    vee = np.maximum(slowest, back) / 2
    dual = ends * np.maximum(np.maximum(2 * inputs, forward + inputs) - weights, forward) / 2
    return np.select([c.put_off == 0, c.vp == 1, c.dual > 0], [loops, alone, dual], vee)


def evened(work: Work, head: Num) -> Num:
    """Blocks that the slowest stage's work comes to, where the head's, of so many blocks, is dealt out with them."""
    s, c = work.sizes, work.cut
    share = (s.layers + head) / c.pp

    def slowest(others: Num) -> Num:
        return np.maximum(others, np.maximum(0, s.layers - others * (c.pp - 1)) + head)

    best = np.minimum(slowest(np.floor(share)), slowest(np.ceil(share)))
    return np.where(work.software.balanced > 1, best, np.ceil(share))


def reductions(work: Work) -> Num:
    """Passes of a step in which gradients go to the CPU, where weights lie there."""
    return np.where(work.cut.zero == 1, 1, work.micro_batches)


def update_time(work: Work) -> tuple[Num, Num]:
    """The optimizer, with sums of gradients where they are apart; and what it has to wait for from the CPU."""
    c, chip, soft = work.cut, work.machine, work.software
    both = copies(work)
    held, state, mine = (sum(one.here(shared) for one in both) for shared in (0, c.zero > 0, c.zero == 3))
    here = (C.adam * state + 12 * mine) / (chip.hbm * C.hbm)
    on_cpu = state / (chip.host_hbm * C.cpu_adam)
    added = soft.adds * (c.zero < 3) * work.micro_batches * held * (c.item + 2 * soft.gradients) / (chip.hbm * C.hbm)
    copied = c.moments_away * 12 * state / chip.host  # weights and gradients down, weights back, and nothing beside it
    copied = copied + c.away * (reductions(work) - 1) * 12 * on_cpu  # what later passes bring down is added there
    return np.where(c.away + c.moments_away, ADAM * on_cpu, here) + added, copied


def weights_carried(work: Work, beat: Beat) -> Num:
    """What of weights goes to the CPU and comes back, as far as no computation hides it: each share travels up to be
    gathered, and down once its gradients are reduced, in every micro-batch as ZeRO has it."""
    c, busy = work.cut, beat.spans
    common, experts, _ = parameters(work)
    trip = c.away * 4 * (common / c.shards + experts / c.expert_shards) / work.machine.host
    carried = np.where(c.zero == 3, work.micro_batches, 1) * np.maximum(0.0, trip - busy[0])
    carried = carried + reductions(work) * np.maximum(0.0, trip * np.where(c.zero == 3, 2, 1) - busy[1])
    return work.blocks * carried
