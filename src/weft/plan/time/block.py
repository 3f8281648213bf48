"""How long one block takes with one micro-batch, kernel by kernel, and what its messages add. Torch-free.

Every function takes one Work or columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.plan.time import collectives
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.gemm import gemm_time
from weft.plan.time.imbalance import fullest
from weft.plan.work import Num, Work

EAGER_NORM = 60
"""Bytes more that an RMSNorm moves for each number of the hidden state, each way, where it is written as PyTorch's own
operations in fp32: some nine kernels forward and twenty backward move 130, one each way 12. Layouts that were run with it
and with a fused one (Hagemann et al. 2023, their data, 22 pairs) differ by 0.93 of that in the middle."""

EAGER_SOFTMAX = 20
"""Bytes more that a score moves, forward, where its softmax is PyTorch's own operations in fp32, as Megatron's is where
its kernel does not take so many keys or heads: to fp32 and back, scaled, masked, each read and written. Backward twice
that. All eleven layouts of 8,192 tokens that were run so (Hagemann et al. 2023, their data) lack 57 to 64 both ways."""


@dataclass(frozen=True)
class Block:
    """Seconds of one block with one micro-batch, forward (0) and backward (1); `routing` is a part of `elementwise`, and
    `kernels` a number. Forward again, of attention (0) and the MLP (1), each with its norm, and of its experts (2): all in
    `parts`, and in `results` what comes after the last thing that a backward pass needs."""

    matmul: tuple[Num, Num]
    attention: tuple[Num, Num]
    elementwise: tuple[Num, Num]
    tp: tuple[Num, Num]
    cp: tuple[Num, Num]
    ep: tuple[Num, Num]
    kernels: tuple[Num, Num]
    routing: tuple[Num, Num]
    parts: tuple[Num, Num, Num]
    results: tuple[Num, Num, Num]


@dataclass(frozen=True)
class Passes:
    """One micro-batch through one block of each kind, and through the head.

    Attributes:
        mixed: a block with experts; None where there are none.
    """

    dense: Block
    mixed: Block | None
    head: Num

    @classmethod
    def of(cls, work: Work) -> Passes:
        mixed = block_time(work, experts=True) if np.any(work.sizes.experts > 0) else None
        return cls(block_time(work, experts=False), mixed, head_time(work))

    def mean(self, name: str, way: int, work: Work) -> Num:
        """A part of Block's, of the mean block."""
        share = work.mixed
        dense = (1 - share) * getattr(self.dense, name)[way]
        return dense + share * getattr(self.mixed, name)[way] if self.mixed else dense

    def rows(self, index: Num) -> Passes:
        """Of these rows: many candidates have the same passes."""

        def taken(block: Block) -> Block:
            parts = {f.name: tuple(np.asarray(way)[..., index] if np.ndim(way) else way for way in getattr(block, f.name))
                     for f in fields(block)}  # fmt: skip
            return Block(**parts)  # type: ignore[arg-type]

        return Passes(taken(self.dense), taken(self.mixed) if self.mixed else None, self.head[index])


def product(work: Work, m: Num, n: Num, k: Num, *, low: bool = True) -> tuple[Num, Num]:
    """Seconds of a linear layer, forward and backward: the gradients of its input and of its weights are products too."""
    chip, cut = work.machine, work.cut
    fp8 = cut.fp8 if low else 0
    rate = np.where(fp8, chip.peak8 * chip.gemm8 * work.software.products8, chip.peak * chip.gemm)
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
    s, c, soft = work.sizes, work.cut, work.software
    around, inner, ep, moved = projections(work), s.ffn, (0.0, 0.0), 0.0
    activated = experts * traffic(work, c.item * 3 * s.expert_ffn * s.per_token * fullest(work) / c.tp * work.tokens)
    if experts:
        mlp, ep, moved = expert_time(work)
        inner = s.expert_ffn * s.per_token * fullest(work) + s.shared_ffn
    else:
        mlp = [
            product(work, work.tokens, (s.matrices - 1) * s.ffn / c.tp, s.hidden),
            product(work, work.tokens, s.hidden, s.ffn / c.tp),
        ]
    attention, tp = attention_time(work), tensor_messages(work)
    cp, (elementwise, light) = context_messages(work, attention), elementwise_time(work, inner, moved, experts)
    own = np.where(soft.fused, C.kernels, C.eager_kernels)
    own = own + C.tp_kernels * (c.tp > 1) * np.where(soft.fused, 0.3, 1.0) + 12 * (c.cp > 1)
    each = C.each_expert * np.maximum(1, s.experts / c.ep) * np.where(soft.graphs > 1, C.graph, 1.0)
    dealt = C.expert_kernels * np.where((soft.graphs > 1) | (soft.graphs_route > 0), C.graph, 1.0) + each
    dealt = dealt * (1 + C.split_kernels * soft.overlap_ep) * experts
    kernels = own * np.where(soft.graphs > 0, C.graph, 1.0) + dealt
    first, second = sum(part[0] for part in around), sum(part[0] for part in mlp)
    last = tp[0] * np.where(c.sp, 0.25, 0.5)  # of two sums, or two gathers and two scatters
    return Block(
        matmul=(first + second, sum(part[1] for part in around + mlp)), attention=attention, elementwise=elementwise, tp=tp,
        cp=cp, ep=ep, kernels=(kernels, kernels * C.backward_kernels), routing=(traffic(work, moved), traffic(work, moved)),
        parts=(
            first + attention[0] + cp[0] + light[0] + tp[0] / 2, second + ep[0] + light[1] + tp[0] / 2,
            experts * (mlp[0][0] + mlp[1][0]) + activated,
        ),
        results=(around[-1][0] + last, mlp[1][0] + ep[0] / 2 + last, experts * mlp[1][0]),
    )  # fmt: skip


def widths(work: Work) -> tuple[Num, Num]:
    """Numbers of a token's queries and of its keys (or values), on one process of tp."""
    s, tp = work.sizes, work.cut.tp
    return s.heads * s.head_dim / tp, np.maximum(1, s.kv_heads / tp) * s.head_dim


def attention_time(work: Work) -> tuple[Num, Num]:
    """Scores and what they weigh, in one kernel or, without flash attention, in several over all scores."""
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    seen = np.minimum(s.window, s.seq)
    seen = seen - seen**2 / (2 * s.seq)  # causal
    scores = work.tokens * np.where(soft.flash, seen, s.seq) * s.heads / c.tp
    # exponents take as long as products where heads have 128 numbers (Blackwell) or 64 (Hopper), and half as long on
    # Ampere, whose products are slower (Shah et al. 2024, 3.1): narrower heads leave these idle, or do not. CDNA 3 has as
    # many exponents for each product as Ampere: 16 a clock of each of 304 units, beside 1,307 TFLOP/s (its ISA, 2024)
    short = np.select([chip.generation == 3, chip.generation == 2], [0.5, C.short_head], 1.0)
    head = np.where(s.head_dim >= 128, 1.0, short + (1 - short) * np.maximum(0, s.head_dim - 64) / 64)
    rows = c.micro_batch * s.heads / c.tp * np.ceil(s.seq / c.cp / 128)
    filled = np.minimum(1.0, rows / chip.sms)
    length = s.seq / c.cp
    kernel = np.where((soft.flash == 1) & ((chip.generation == 2) | (chip.generation == 3)), C.flash2, 1.0)
    kernel = np.where((soft.flash > 0) & (soft.flash < 1), C.flash1, kernel)
    kernel = np.where((soft.flash == 3) & (chip.generation == 2), C.flash3, kernel)
    flops = 2 * scores * (s.head_dim + s.values)
    flash = flops / (chip.peak * chip.attention * kernel * head * filled * length / (length + C.attention_length))
    # heads that are no multiple of 16 bytes are none of the tensor cores'
    rate = np.where(s.head_dim * c.item % 16, chip.peak / 16, 0.6 * chip.peak * chip.gemm)
    odd = (soft.softmax < np.inf) & ((s.seq > soft.softmax) | (c.micro_batch * s.heads / c.tp % 4 > 0))
    plain = flops / rate + scores * (C.scores + EAGER_SOFTMAX * odd) / (chip.hbm * C.hbm)
    forward = np.where(soft.flash, flash, plain) + C.kernel
    return forward, np.where(soft.flash, 2.5 * flash / C.attention_backward, 2 * plain) + 3 * C.kernel


def elementwise_time(work: Work, inner: Num, moved: Num, experts: bool) -> tuple[tuple[Num, Num], tuple[Num, Num]]:
    """Norms, activations, rotary positions, residuals, and in fp8 the rounding: both ways; and forward, attention's and the
    MLP's, each with its norm.

    Args:
        inner: numbers inside of a token's MLP, on all processes of tp.
        moved: bytes of dealing tokens out to experts.
    """
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    tokens, tp = work.tokens, c.tp
    query, kv = widths(work)
    wide = tokens / np.where(c.sp, tp, 1)
    mixing, feeding = (2 * (query + kv) + 2 * s.latents) * tokens, s.matrices * inner / tp * tokens
    numbers = 10 * s.hidden * wide + mixing + feeding + soft.dropout * 4 * s.hidden * wide
    eager = EAGER_NORM * (soft.fused == 0) * (soft.fused_norm == 0) * (s.matrices == 3) * 2 * s.hidden * wide
    seconds = traffic(work, c.item * numbers + moved + eager)
    quantized = C.quantize * tokens * c.fp8 * ((2 + experts * s.per_token / tp) * s.hidden + query + inner / tp)
    rounding = quantized / (chip.hbm * C.hbm)
    more = traffic(work, c.item * (feeding - mixing) + moved)  # than attention the MLP has
    both = seconds + rounding
    return (both, C.traffic_backward * seconds + rounding), ((both - more) / 2, (both + more) / 2)


def tensor_messages(work: Work) -> tuple[Num, Num]:
    """What tp's processes send each other: gathers and reduce-scatters with sp, sums without."""
    c, chip, soft = work.cut, work.machine, work.software
    volume = work.tokens * work.sizes.hidden * c.item
    one, waited = collectives.gather(c.tp, 1, chip, volume), collectives.waited(c.tp, 1, chip)
    sums = 2 * collectives.reduce(c.tp, 1, chip, volume)  # two of them each way
    shown = np.where(soft.overlap_tp, 1 - C.tp_hidden, 1.0)
    forward, backward = (
        np.where(c.sp > 0, gathers * (one + waited), sums + 4 * waited) * shown
        for gathers in (4, 6 - 2 * soft.keeps_gathered)
    )
    return forward, backward


def context_messages(work: Work, attention: tuple[Num, Num]) -> tuple[Num, Num]:
    """What cp's processes send each other: keys and values gathered, or from hand to hand beside `attention`; or heads
    dealt out."""
    c, chip = work.cut, work.machine
    query, kv = widths(work)
    hop = collectives.gather(c.cp, c.tp, chip, 2 * work.tokens * kv * c.item * c.cp)
    dealt = collectives.all_to_all(c.cp, c.tp, chip, 2 * (query + kv) * work.tokens * c.item)

    def way(times: int, busy: Num) -> Num:
        ring = np.maximum(0, times * hop - 0.9 * busy) + (c.cp - 1) * 3 * C.kernel * times
        return np.where(c.cp > 1, np.where(c.ulysses, dealt, np.where(c.gathers, times * hop, ring)), 0.0)

    return way(1, attention[0]), way(2, attention[1])


def projections(work: Work) -> list[tuple[Num, Num]]:
    """The products around attention: queries, keys and values, and the result. Latent attention first makes short
    vectors, which every process of tp makes whole, and of these each head's own."""
    s, c = work.sizes, work.cut
    tokens, tp = work.tokens, c.tp
    query, kv = widths(work)
    out = product(work, tokens, s.hidden, s.heads * s.values / tp)
    plain = product(work, tokens, query + 2 * kv, s.hidden)
    if not np.any(s.kv_rank > 0):
        return [plain, out]
    parts = [
        product(work, tokens, s.latents + np.where(s.q_rank > 0, 0, query), s.hidden),
        product(work, tokens, query, np.maximum(1, s.q_rank)),
        product(work, tokens, s.raised / tp, np.maximum(1, s.kv_rank)),
    ]
    uses = (1, s.q_rank > 0, 1)
    latent = [sum(part[way] * use for part, use in zip(parts, uses, strict=True)) for way in (0, 1)]
    return [(np.where(s.kv_rank > 0, latent[0], plain[0]), np.where(s.kv_rank > 0, latent[1], plain[1])), out]


def expert_time(work: Work) -> tuple[list[tuple[Num, Num]], tuple[Num, Num], Num]:
    """The products of the experts, shared ones too, the messages to and from them, and the bytes of dealing tokens out."""
    s, c, chip, soft = work.sizes, work.cut, work.machine, work.software
    own = np.maximum(1, s.experts / c.ep)
    mine = work.tokens / c.tp * np.maximum(1, s.per_token)  # each process deals out its part of the sequence
    come = mine * fullest(work)  # from the others, to the process that all wait for
    rows = come * c.etp
    each = np.maximum(1, rows / own)
    up = product(work, each, 2 * s.expert_ffn / c.etp, s.hidden)
    down = product(work, each, s.hidden, s.expert_ffn / c.etp)
    products = [(own * (part[0] - C.kernel), own * (part[1] - 2 * C.kernel)) for part in (up, down)]
    if np.any(s.shared_ffn > 0):
        wide = np.maximum(1, s.shared_ffn / c.tp)
        beside = product(work, work.tokens, 2 * wide, s.hidden), product(work, work.tokens, s.hidden, wide)
        products += [(part[0] * (s.shared_ffn > 0), part[1] * (s.shared_ffn > 0)) for part in beside]
    way = collectives.all_to_all(c.ep, c.etp, chip, come * s.hidden * c.item, np.where(soft.dedup, s.per_token, 1))
    way = way + collectives.gather(c.etp, 1, chip, rows * s.hidden * c.item)  # each has a part of every expert
    shown = np.where(soft.overlap_ep, 1 - C.ep_hidden, 1.0)
    dealt = (mine + rows) / 2 * s.hidden * c.item  # its own, and all that come to a group of etp
    return products, (2 * way * shown, 2 * way * shown), C.routing * soft.routing * dealt


def head_time(work: Work) -> Num:
    """The logits and their loss, both ways, of one micro-batch."""
    s, c = work.sizes, work.cut
    parts = product(work, work.tokens, s.vocab / c.tp, s.hidden, low=False)
    moved = np.where(work.software.lean_loss, 3 * c.item, C.loss)
    return sum(parts) + traffic(work, moved * work.tokens * s.vocab / c.tp)


def parameters(work: Work) -> tuple[Num, Num, Num]:
    """Of one block on one process (cut over tp, ep): what all have, what experts are; and of one table."""
    s, c = work.sizes, work.cut
    plain = s.hidden * (2 * s.heads + 2 * s.kv_heads) * s.head_dim / c.tp
    queries = np.where(s.q_rank > 0, s.q_rank, s.hidden) * s.heads * s.head_dim
    heads = queries + s.kv_rank * s.raised + s.heads * s.value_dim * s.hidden
    attention = np.where(s.kv_rank > 0, s.hidden * s.latents + heads / c.tp, plain)
    dense = attention + s.matrices * s.hidden * s.ffn / c.tp
    mixed = attention + s.hidden * s.experts + 3 * s.hidden * s.shared_ffn / c.tp
    experts = 3 * s.hidden * s.expert_ffn * s.experts / (c.ep * c.etp)
    share = work.mixed
    return share * mixed + (1 - share) * dense, share * experts, s.vocab * s.hidden / c.tp
