"""How long a step of training takes, by what takes it. Torch-free.

One micro-batch is timed on the process that has most to do: kernel by kernel, then what the messages add, then the
pipeline and the update around it. Every function takes one Work or columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.plan import collectives
from weft.plan.constants import CONSTANTS as C
from weft.plan.gemm import gemm_time
from weft.plan.work import Num, Work


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
        optimizer: the update.
        rest: data, logging, stragglers.
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

    @property
    def total(self) -> Num:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Block:
    """Seconds of one block with one micro-batch, forward (0) and backward (1)."""

    matmul: tuple[Num, Num]
    attention: tuple[Num, Num]
    elementwise: tuple[Num, Num]
    tp: tuple[Num, Num]
    cp: tuple[Num, Num]
    ep: tuple[Num, Num]
    kernels: tuple[Num, Num]


def product(work: Work, m: Num, n: Num, k: Num, *, low: bool = True) -> tuple[Num, Num]:
    """Seconds of a linear layer, forward and backward: the gradients of its input and of its weights are products too."""
    chip, cut = work.machine, work.cut
    fp8 = cut.fp8 if low else 0
    rate = np.where(fp8, chip.peak8 * chip.gemm8, chip.peak * chip.gemm)
    rate = np.where(cut.item > 2, rate / 2, rate)
    item = np.where(fp8, 1, cut.item)
    forward = gemm_time(m, n, k, rate, chip.sms, chip.hbm, item)
    back = gemm_time(m, k, n, rate, chip.sms, chip.hbm, item)
    weights = gemm_time(k, n, m, rate, chip.sms, chip.hbm, item, 2 * work.software.gradients)
    return forward, back + weights


def traffic(work: Work, size: Num) -> Num:
    """Seconds to move so many bytes by element-wise kernels."""
    return C.traffic * size / (work.machine.hbm * C.hbm) * np.where(work.software.fused, 1.0, C.eager)


def block_time(work: Work, experts: bool) -> Block:
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    tokens, tp = work.tokens, c.tp
    query, kv = s.heads * s.head_dim / tp, np.maximum(1, s.kv_heads / tp) * s.head_dim
    parts = [product(work, tokens, query + 2 * kv, s.hidden), product(work, tokens, s.hidden, query)]
    inner = s.ffn
    ep_time: tuple[Num, Num] = (0.0, 0.0)
    moved = 0.0
    if experts:
        parts_, ep_time, moved = expert_time(work)
        parts += parts_
        inner = s.expert_ffn * s.per_token
    else:
        parts += [
            product(work, tokens, (s.matrices - 1) * s.ffn / tp, s.hidden),
            product(work, tokens, s.hidden, s.ffn / tp),
        ]
    matmul = (sum(part[0] for part in parts), sum(part[1] for part in parts))

    seen = np.minimum(s.window, s.seq)
    seen = seen - seen**2 / (2 * s.seq)  # causal
    scores = tokens * np.where(soft.flash, seen, s.seq) * s.heads / tp
    head = np.where(s.head_dim >= 128, 1.0, C.short_head + (1 - C.short_head) * np.maximum(0, s.head_dim - 64) / 64)
    rows = c.micro_batch * s.heads / tp * np.ceil(s.seq / c.cp / 128)
    filled = np.minimum(1.0, rows / chip.sms)
    length = s.seq / c.cp
    kernel = np.where((soft.flash == 1) & (chip.generation >= 2), C.flash2, 1.0)
    flash = (
        4
        * scores
        * s.head_dim
        / (chip.peak * chip.attention * kernel * head * filled * length / (length + C.attention_length))
    )
    plain = 4 * scores * s.head_dim / (0.6 * chip.peak * chip.gemm) + scores * C.scores / (chip.hbm * C.hbm)
    forward = np.where(soft.flash, flash, plain) + C.kernel
    backward = np.where(soft.flash, 2.5 * flash / C.attention_backward, 2 * plain) + 3 * C.kernel

    wide = tokens / np.where(c.sp, tp, 1)
    numbers = 10 * s.hidden * wide + (2 * (query + kv) + (s.matrices + 0) * inner / tp) * tokens
    numbers = numbers + soft.dropout * 4 * s.hidden * wide
    bytes_ = c.item * numbers + moved
    quantized = C.quantize * tokens * c.fp8 * ((2 + experts * s.per_token / tp) * s.hidden + query + inner / tp)
    elementwise = (
        traffic(work, bytes_) + quantized / (chip.hbm * C.hbm),
        C.traffic_backward * traffic(work, bytes_) + quantized / (chip.hbm * C.hbm),
    )

    volume = tokens * s.hidden * c.item
    one = collectives.gather(tp, 1, chip, volume) + collectives.waited(tp, 1, chip)
    shown = np.where(soft.overlap_tp, 1 - C.tp_hidden, 1.0)
    tp_time = (4 * one * shown, np.where((c.sp > 0) & (soft.keeps_gathered == 0), 6, 4) * one * shown)

    keys = 2 * tokens * kv * c.item
    hop = collectives.gather(c.cp, tp, chip, keys * c.cp)
    cp_time = tuple(
        np.where(
            c.cp > 1,
            np.where(
                c.gathers, times * hop, np.maximum(0, times * hop - 0.9 * busy) + (c.cp - 1) * 3 * C.kernel * times
            ),
            0.0,
        )
        for times, busy in ((1, forward), (2, backward))
    )
    fused = (
        np.where(soft.fused, C.kernels, C.eager_kernels)
        + C.tp_kernels * (tp > 1) * np.where(soft.fused, 0.3, 1.0)
        + 12 * (c.cp > 1)
        + 40 * experts
    )
    kernels = (fused, fused * C.backward_kernels)
    return Block(matmul, (forward, backward), elementwise, tp_time, cp_time, ep_time, kernels)  # type: ignore[arg-type]


def expert_time(work: Work) -> tuple[list[tuple[Num, Num]], tuple[Num, Num], Num]:
    """The products of the experts, the messages to and from them, and the bytes of dealing tokens out."""
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    own = np.maximum(1, s.experts / c.ep)
    mine = work.tokens / c.tp * np.maximum(1, s.per_token)  # each process deals out its part of the sequence
    rows = mine * c.etp * C.imbalance  # as many come in from the others
    each = np.maximum(1, rows / own)
    up = product(work, each, 2 * s.expert_ffn / c.etp, s.hidden)
    down = product(work, each, s.hidden, s.expert_ffn / c.etp)
    products = [(own * (part[0] - C.kernel), own * (part[1] - 2 * C.kernel)) for part in (up, down)]
    way = collectives.all_to_all(c.ep, c.etp, chip, mine * s.hidden * c.item, np.where(soft.dedup, s.per_token, 1))
    way = way + collectives.gather(c.etp, 1, chip, mine * c.etp * s.hidden * c.item)  # each has a part of every expert
    shown = np.where(soft.overlap_ep, 1 - C.ep_hidden, 1.0)
    return products, (2 * way * shown, 2 * way * shown), C.routing * mine * c.etp * s.hidden * c.item


def head_time(work: Work) -> Num:
    """The logits and their loss, both ways, of one micro-batch."""
    s, c = work.sizes, work.cut
    parts = product(work, work.tokens, s.vocab / c.tp, s.hidden, low=False)
    return sum(parts) + traffic(work, C.loss * work.tokens * s.vocab / c.tp)


def parameters(work: Work) -> tuple[Num, Num, Num]:
    """Of one block on one process (cut over tp, ep): what all have, what experts are; and of one table."""
    s, c = work.sizes, work.cut
    attention = s.hidden * (2 * s.heads + 2 * s.kv_heads) * s.head_dim / c.tp
    dense = attention + s.matrices * s.hidden * s.ffn / c.tp
    mixed = attention + s.hidden * s.experts
    experts = 3 * s.hidden * s.expert_ffn * s.experts / (c.ep * c.etp)
    share = np.where(s.experts > 0, (s.layers - s.dense_layers) / s.layers, 0.0)
    return share * mixed + (1 - share) * dense, share * experts, s.vocab * s.hidden / c.tp


def step_time(work: Work) -> Time:
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    share = np.where(s.experts > 0, (s.layers - s.dense_layers) / s.layers, 0.0)
    dense = block_time(work, experts=False)
    kinds = [(dense, 1 - share)]
    if np.any(s.experts > 0):
        kinds.append((block_time(work, experts=True), share))

    def of(name: str, way: int) -> Num:
        return sum(weight * getattr(block, name)[way] for block, weight in kinds)

    again = c.full
    compute = [sum(of(name, way) for name in ("matmul", "attention", "elementwise")) for way in (0, 1)]
    messages = [sum(of(name, way) for name in ("tp", "cp", "ep")) for way in (0, 1)]
    selective = c.selective * np.where(soft.flash > 0, of("elementwise", 0), of("attention", 0))
    redo = again * (compute[0] + messages[0]) + selective

    blocks, count = work.blocks, work.micro_batches
    head = head_time(work)
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
        np.maximum(0.0, need - C.fsdp_hidden * time) + C.contention * np.minimum(size / chip.nvlink, time)
        for need, size, time in zip(needs3, sizes3, busy, strict=True)
    ]
    fsdp = np.where(zero3, shown3[0] + shown3[1], 0.0)

    host = C.host * np.where(soft.graphs, 0.3, 1.0)
    launched = host * (of("kernels", 0) * (1 + again) + of("kernels", 1))
    gpu = busy[0] + busy[1] + fsdp
    launch = np.maximum(0.0, launched - gpu)

    per_block = gpu + launch
    # the last process has the head too; where stages cannot be cut finer, it is the slowest
    spare = np.where(c.pp > 1, blocks - s.layers / c.pp, 0.0) * per_block
    slowest_head = np.where(c.pp > 1, np.maximum(0.0, head - spare), head)
    even = np.ceil((s.layers * per_block + head) / c.pp / per_block) * per_block
    slowest_head = np.where((soft.balanced > 0) & (c.pp > 1), np.maximum(head, even) - blocks * per_block, slowest_head)
    mean = (s.layers * per_block + head) / c.pp

    flow = collectives.send(
        inner * c.dp * c.fsdp, chip, work.tokens * s.hidden * c.item / np.where((c.tp > 1), c.tp, 1)
    )
    pp_shown = np.where(soft.overlap_pp, C.pp_exposed * 0.4, C.pp_exposed)
    pp = np.where(c.pp > 1, 2 * flow * (count * c.vp * pp_shown + (c.pp - 1)), 0.0)
    bubble = np.where(c.pp > 1, (c.pp - 1) * mean / c.vp * c.bubble, 0.0)

    # gradients: reduced once a step, beside the last backward pass; weights gathered beside the first forward pass
    tables = table * np.where(c.pp > 1, 1, 2 - s.tied)
    held = blocks * (common + experts) + tables
    ways = np.where(c.zero == 3, c.dp, c.dp * shards)
    stride = np.where(c.zero == 3, inner * c.fsdp, c.tp)
    reduction = collectives.gather(ways, stride, chip, held / np.where(zero3, shards, 1) * soft.reduced)
    spread = collectives.gather(
        ways, stride, chip, held / np.where(zero3, shards, 1) * np.where((c.zero > 0) & (c.zero < 3), 2, soft.reduced)
    )
    # interleaved, a chunk's gradients are whole while the other chunks still have a round to do
    rounds = np.where(c.vp > 1, np.maximum(1.0, np.minimum(count, c.pp) * (c.vp - 1) / c.vp), 1.0)
    window_b, window_f = (rounds * blocks * time * C.dp_hidden for time in (busy[1], busy[0]))
    zero1 = (c.zero == 1) | (c.zero == 2)
    hidden = np.maximum(0.0, reduction - window_b) + np.maximum(
        0.0, spread - np.where(zero1, window_f, np.maximum(0, window_b - reduction))
    )
    tail = (reduction + spread) / np.maximum(1, blocks)
    dp = np.where(
        soft.overlap_dp,
        hidden + tail + C.contention * held / np.where(zero3, shards, 1) * 2 * soft.reduced / chip.nvlink,
        reduction + spread,
    )
    dp = np.where(ways > 1, dp, 0.0) + count * blocks * fsdp

    state = held / np.where(c.zero > 0, shards, 1)
    optimizer = (C.adam * state + 12 * held / np.where(zero3, shards, 1)) / (chip.hbm * C.hbm)

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
        head=count * slowest_head, recompute=count * blocks * redo, launch=count * blocks * launch,
        tp=count * blocks * (of("tp", 0) + of("tp", 1)), cp=count * blocks * (of("cp", 0) + of("cp", 1)),
        ep=count * blocks * (of("ep", 0) + of("ep", 1)), dp=dp, pp=pp, bubble=bubble, optimizer=optimizer, rest=0.0,
    )  # fmt: skip
    slow = C.straggle * np.log2(np.maximum(1.0, c.gpus / 8))
    return Time(**{**{f.name: getattr(parts, f.name) for f in fields(parts)}, "rest": C.step + slow * parts.total})
