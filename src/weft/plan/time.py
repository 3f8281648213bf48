"""How long a step of training takes, by what takes it. Torch-free.

One micro-batch is timed on the process that has most to do: kernel by kernel, then what the messages add, then the
pipeline and the update around it. Every function takes one Work or columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.plan import collectives
from weft.plan.block import Passes, parameters
from weft.plan.constants import CONSTANTS as C
from weft.plan.kept import block_activations
from weft.plan.work import Num, Work

ADAM = 28
"""Bytes that an update moves for each parameter: gradient, weight and moments read, all but the gradient written."""


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

    @property
    def total(self) -> Num:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def spread(self) -> Num:
        """How near this is: four of five published runs that no constant was fitted to are within this share of the total
        (docs/plan.md). Waiting is known worse than work."""
        waiting = sum(
            getattr(self, name) for name in ("launch", "tp", "cp", "ep", "dp", "pp", "bubble", "offload", "rest")
        )
        return 0.12 + 0.45 * np.maximum(0.0, waiting / self.total - 0.25)


def step_time(work: Work, passes: Passes | None = None) -> Time:
    """`passes`: where they are known already."""
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    share, passes = work.mixed, passes or Passes.of(work)
    kinds = [(passes.dense, 1 - share)] + ([(passes.mixed, share)] if passes.mixed else [])

    def of(name: str, way: int) -> Num:
        return sum(weight * getattr(block, name)[way] for block, weight in kinds)

    again = c.full
    compute = [sum(of(name, way) for name in ("matmul", "attention", "elementwise")) for way in (0, 1)]
    messages = [sum(of(name, way) for name in ("tp", "cp", "ep")) for way in (0, 1)]
    selective = c.selective * np.where(soft.flash > 0, of("elementwise", 0), of("attention", 0))
    selective = selective + c.selective * soft.alternate * of("matmul", 0) / 2
    redo = again * (compute[0] + messages[0]) + selective

    blocks, count = work.blocks, work.micro_batches
    head = passes.head
    inner = c.tp * c.cp
    common, experts, table = parameters(work)

    # ZeRO-3 gathers a block's weights forward and backward and scatters its gradients, beside its neighbour's computation
    shards = c.fsdp * c.cp
    volume = common + experts / np.maximum(1, c.ep / inner)
    gather3 = collectives.gather(shards, c.tp, chip, volume * np.maximum(2, np.minimum(c.item, 2)))
    scatter3 = collectives.gather(shards, c.tp, chip, volume * soft.reduced)
    needs3 = (gather3, gather3 + scatter3)
    sizes3 = (2 * volume, (2 + soft.reduced) * volume)
    zero3 = (c.zero == 3) & (shards > 1)
    busy = (compute[0] + messages[0], compute[1] + messages[1] + redo)
    shown3 = [
        np.maximum((1 - soft.overlap_dp) * need, need - C.fsdp_hidden * time)
        + C.contention * np.minimum(size / chip.nvlink, time)
        for need, size, time in zip(needs3, sizes3, busy, strict=True)
    ]
    fsdp = np.where(zero3, shown3[0] + shown3[1], 0.0)

    host = C.host * np.where(soft.graphs, 0.3, 1.0)
    launched = host * (of("kernels", 0) * (1 + again) + of("kernels", 1)) + soft.tp_host * (c.tp > 1)

    # what a block keeps goes to the CPU while it computes forward, and comes back while it computes backward
    moved = c.offload * block_activations(work) * (1 - c.full) / chip.host
    away = np.maximum(0.0, moved - busy[0]) + np.maximum(0.0, moved - busy[1])
    # each share travels up to be gathered, and down once its gradients are reduced: in every micro-batch, as ZeRO has it
    trip = c.away * 4 * (common + experts) / shards / chip.host
    gathers, reductions = np.where(c.zero == 3, count, 1), np.where(c.zero == 1, 1, count)
    carried = gathers * np.maximum(0.0, trip - busy[0])
    carried = carried + reductions * np.maximum(0.0, trip * np.where(c.zero == 3, 2, 1) - busy[1])
    gpu = busy[0] + busy[1] + fsdp
    late = np.maximum(0.0, launched - gpu)
    per_block = gpu + soft.blocking * late
    # the last process has the head too; where stages cannot be cut finer, it is the slowest
    spare = np.where(c.pp > 1, blocks - s.layers / c.pp, 0.0) * per_block
    slowest_head = np.where(c.pp > 1, np.maximum(0.0, head - spare), head)
    even = np.ceil((s.layers * per_block + head) / c.pp / per_block) * per_block
    slowest_head = np.where((soft.balanced > 0) & (c.pp > 1), np.maximum(head, even) - blocks * per_block, slowest_head)
    mean = (s.layers * per_block + head) / c.pp

    flow = collectives.send(
        inner * c.dp * c.fsdp, chip, work.tokens * s.hidden * c.item / np.where(soft.whole_pp, 1, c.tp)
    )
    pp_shown = np.where(soft.overlap_pp, C.pp_exposed * 0.4, C.pp_exposed)
    pp = np.where(c.pp > 1, 2 * flow * (count * c.vp * pp_shown + (c.pp - 1)), 0.0)
    bubble = np.where(c.pp > 1, (c.pp - 1) * mean / c.vp * c.bubble, 0.0)
    # a CPU that does not wait for messages of stages goes on launching: it is late where all of its work takes longer
    most = np.where((soft.balanced > 0) & (c.pp > 1), np.minimum(s.layers, even / per_block), blocks)
    ahead = np.maximum(0.0, count * (most * launched - blocks * gpu) - pp - bubble)
    launch = np.where(soft.blocking, count * blocks * late, ahead)
    pp = pp + count * soft.stall * np.minimum(2, c.pp - 1)

    # gradients: reduced once a step, beside the last backward pass; weights gathered beside the first forward pass
    tables = table * np.where(c.pp > 1, 1, 2 - s.tied)
    held = blocks * (common + experts) + tables
    ways = np.where(c.zero == 3, c.dp, c.dp * shards)
    stride = np.where(c.zero == 3, inner * c.fsdp, c.tp)
    summed = held / np.where(zero3, shards, 1) * soft.reduced
    zero1 = (c.zero == 1) | (c.zero == 2)
    scattered = collectives.gather(ways, stride, chip, summed) * (1 + soft.whole_dp)
    reduction = np.where(zero1, scattered, collectives.reduce(ways, stride, chip, summed) / 2)
    # where a part of the replicas shares the states, these gather among themselves, and gradients go round the rest
    among = np.where(zero1 & (c.dp > 1), shards, ways)
    copies = collectives.gather(among, stride, chip, 2 * held)
    copies = copies + collectives.gather(c.dp, stride * shards, chip, held / shards * soft.reduced)
    spread = np.where(zero1, copies, reduction)
    # interleaved, a chunk's gradients are whole while the other chunks still have a round to do
    rounds = np.where(c.vp > 1, np.maximum(1.0, np.minimum(count, c.pp) * (c.vp - 1) / c.vp), 1.0)
    window_b, window_f = (rounds * blocks * time * C.dp_hidden for time in (busy[1], busy[0]))
    hidden = np.maximum(0.0, reduction - window_b)
    beside = np.where(zero1, window_f, np.maximum(0, window_b - reduction))
    hidden = hidden + np.maximum(0.0, spread - np.where(soft.overlap_dp == 1, beside, 0.0))
    tail = (reduction + spread) / np.maximum(1, blocks)
    dp = np.where(
        soft.overlap_dp > 0,
        hidden + tail + C.contention * held / np.where(zero3, shards, 1) * 2 * soft.reduced / chip.nvlink,
        reduction + spread,
    )
    dp = np.where(ways > 1, dp + zero1 * soft.turns * among, 0.0) + count * blocks * fsdp

    state = held / np.where(c.zero > 0, shards, 1)
    optimizer = (C.adam * state + 12 * held / np.where(zero3, shards, 1)) / (chip.hbm * C.hbm)
    on_cpu = state / (chip.host_hbm * C.cpu_adam)
    optimizer = np.where(c.away + c.moments_away, ADAM * on_cpu, optimizer)
    copied = c.moments_away * 12 * state / chip.host  # weights and gradients down, weights back, and nothing beside it
    copied = copied + c.away * (reductions - 1) * 12 * on_cpu  # what later passes bring down is added there

    added = soft.adds * (c.zero < 3) * count * held * (c.item + 2 * soft.gradients) / (chip.hbm * C.hbm)

    plain = [
        count * blocks * x
        for x in (
            of("matmul", 0) + of("matmul", 1),
            of("attention", 0) + of("attention", 1),
            of("elementwise", 0) + of("elementwise", 1),
        )
    ]
    parts = Time(
        matmul=plain[0], attention=plain[1], elementwise=plain[2],
        head=count * slowest_head, recompute=count * blocks * redo, launch=launch,
        tp=count * blocks * (of("tp", 0) + of("tp", 1)), cp=count * blocks * (of("cp", 0) + of("cp", 1)),
        ep=count * blocks * (of("ep", 0) + of("ep", 1)), dp=dp, pp=pp, bubble=bubble, optimizer=optimizer + added, rest=0.0,
        offload=count * blocks * away + blocks * carried + copied,
    )  # fmt: skip
    slow = C.straggle * np.log2(np.maximum(1.0, c.gpus / 8))
    return Time(**{**{f.name: getattr(parts, f.name) for f in fields(parts)}, "rest": C.step + slow * parts.total})
