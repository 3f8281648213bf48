"""What a block keeps of one micro-batch for its backward pass, in closed form. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from weft.plan.time.block import widths
from weft.plan.time.imbalance import fullest
from weft.plan.work import Num, Work

EAGER_NORM = 3
"""Numbers of 16 bits more that an RMSNorm keeps for each of the hidden state where it is written as PyTorch's own
operations: its input and what it was scaled to, both in fp32, and not the input in 16 bits. With it 16 more of Hagemann's
layouts that ran out of memory are said to, and 4 more of those that ran."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one block and one micro-batch.

    Attributes:
        input: what goes into it, of which a block that is computed again keeps nothing else.
        block: from forward to backward.
        delayed: of gradients of weights that are put off.
        redone: what a block or a part of it that is computed again as a whole makes at once; `remade`: what is made again
            of one in which products and attention are not.
        experts: what is inside of them.
        inside: gradients in its backward pass, at the widest place.
        whole: the hidden state, all of it.
    """

    input: Num
    block: Num
    delayed: Num
    redone: Num
    remade: Num
    experts: Num
    inside: Num
    whole: Num

    @classmethod
    def of(cls, work: Work) -> Kept:
        c, block = work.cut, block_activations(work)
        redone, remade = np.where(c.full > 0, block, 0.0), 0.0 * block
        *_, experts = parts_activations(work)
        shares = (c.redo_attention, c.redo_mlp, c.redo_experts)
        if any(np.any(share > 0) for share in shares):
            parts = ((share > 0) * size for share, size in zip(shares, parts_activations(work), strict=True))
            redone = np.maximum(redone, reduce(np.maximum, parts))
        if np.any(c.selective > 0):
            whole = block_activations(replace(work, cut=replace(c, selective=0 * c.selective)))
            remade = np.where(c.selective > 0, whole - block, 0.0)
        whole = c.item * work.tokens * work.sizes.hidden
        one = whole / np.where(c.sp, c.tp, 1)
        return cls(one, block, waiting_gradients(work), redone, remade, experts, inside(work), whole)


def known(work: Work) -> Num:
    """Whether a backward pass is weft's, or one of FSDP2's."""
    soft = work.software
    return (soft.own_head > 0) | (soft.weights > work.cut.item) & (soft.alternate == 0)


def block_activations(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch: Korthikanti et al. 2022, section 4, by the block's own sizes."""
    s, c, soft = work.sizes, work.cut, work.software
    tokens, tp = work.tokens, c.tp
    wide = tokens / np.where(c.sp, tp, 1)
    query, kv = widths(work)
    share = work.mixed
    attention, mlp, experts = parts_activations(work)
    # two norms' inputs, of which nothing else is kept where what follows is computed again
    beside = (2 + soft.dropout * 2 / c.item) * s.hidden * wide + soft.copies * s.hidden * tokens / tp
    every = c.item * beside + (1 - c.redo_attention) * attention + (1 - c.redo_mlp) * mlp - c.redo_experts * experts
    # or every second product is computed again, as torchtitan has it
    given = tokens * (query + 2 * kv) + 2 * s.hidden * wide + (s.matrices - 1) * activated(work)  # by products
    second = c.item * (s.hidden * wide + tokens * query + given / 2) + tokens * s.heads / tp * 4
    # or the results of products stay, and what came over the network, as weft has it
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    sent = np.where(tp > 1, s.hidden * (2 * tokens + (2 * c.sp - (1 - share)) * wide), 0.0)
    dealt = (query + kv) * (1 + s.values / s.head_dim) * tokens  # queries and keys, values and results, over heads
    sent = sent + np.where((c.cp > 1) & (c.ulysses > 0), dealt, 0.0)
    # but the block's own result, and what goes into a message
    whole = s.hidden * ((tp == 1) + share * (s.shared_ffn > 0))
    results = tokens * (2 * query + 2 * kv + (s.matrices - 1) * columns / tp + whole)
    stay = c.item * (s.hidden * wide + results + sent) + tokens * s.heads / tp * 4
    # or, of products, only those around attention
    around = c.item * (query + 2 * kv) + (soft.remakes < 2) * (c.item * query + s.heads / tp * 4)
    named = c.item * (1 + (soft.remakes < 3)) * s.hidden * wide + tokens * around
    kinds = [c.selective * soft.alternate > 0, c.selective * soft.results > 0, c.selective * soft.remakes > 0]
    return np.select(kinds, [second + 0 * every, stay + 0 * every, named + 0 * every], every)


def parts_activations(work: Work) -> tuple[Num, Num, Num]:
    """Bytes that attention and the MLP keep, each with its norm, beside what goes into that, and what of the latter experts
    keep: of the mean block. Of what is computed again selectively products and attention keep their results."""
    s, c, soft = work.sizes, work.cut, work.software
    tokens, tp, share = work.tokens, c.tp, work.mixed
    wide = tokens / np.where(c.sp, tp, 1)
    query, kv = widths(work)
    cheap = c.selective * (soft.flash > 0)
    in_8_bits = soft.keeps8 * c.fp8 * (c.item - 1)  # what products took: after norms, before experts, after activations
    # one kernel, one result: of norms, positions, activations
    eager = (1 - cheap) * (soft.fused == 0) * (s.matrices == 3)
    normed = (1 - cheap) * (c.item - in_8_bits) * s.hidden * wide + c.item * (
        eager * (soft.fused_norm == 0) * EAGER_NORM * s.hidden * wide
        + c.sp * soft.keeps_gathered * s.hidden * (tokens - wide)
    )
    # queries, keys, values, the result; of latent attention their short vectors, too
    raised = np.where(soft.raises_again, s.value_dim, 2 * s.head_dim + 2 * s.value_dim)  # or the result alone
    latent = 2 * s.latents + s.heads * raised / tp
    inner = np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv) + eager * (soft.fused_norm < 2) * (query + kv)
    inner = inner + (1 - cheap) * s.qk_norm * (query + kv)  # as they went into norms of their own
    inner = inner + (c.cp > 1) * c.ulysses * s.heads * s.values / tp  # the result, before it was cut by token again
    scores = np.where(soft.flash, 0.0, c.micro_batch * s.heads / tp * s.seq**2 / c.cp * (2 * c.item + soft.dropout))
    windowed = soft.masks * (s.window < s.seq) * ((c.cp == 1) | (c.ulysses > 0))  # else it is made tile by tile
    scores = scores + windowed * c.item * s.seq**2
    attention = c.item * tokens * inner + tokens * s.heads / tp * 4 + np.where(c.selective > 0, 0.0, scores)
    # the MLP's two or three inner states
    states = s.matrices - cheap
    mine = stashed(work)  # as if one process had most in every block
    inner, gathered = states + (soft.weighs > 1), np.where(soft.weighs > 1, c.etp, 1)
    routed = mine * ((1 + gathered - np.minimum(1, soft.weighs)) * s.hidden + inner * s.expert_ffn)
    routed = routed + tokens * states * s.shared_ffn / tp
    mlp = c.item * ((1 - share) * tokens * states * s.ffn / tp + share * routed + eager * activated(work))
    mlp = mlp - in_8_bits * ((1 - cheap) * activated(work) + share * mine * s.hidden)
    # what is dealt out to experts is kept as it came, where they are computed again
    inside = s.expert_ffn * (c.item * (states + (soft.weighs > 1) + eager) - in_8_bits * (1 - cheap))
    experts = share * mine * (inside - in_8_bits * s.hidden)
    return normed + attention, normed + mlp, experts


def stashed(work: Work) -> Num:
    """Pairs of a token and an expert that a process keeps the inner states of, of one micro-batch and block."""
    even = work.tokens / work.cut.tp * work.sizes.per_token
    return even * np.maximum(fullest(work), work.software.stash)


def activated(work: Work) -> Num:
    """Numbers that the activations of one micro-batch give, of the mean block."""
    s, tokens, tp, share = work.sizes, work.tokens, work.cut.tp, work.mixed
    mine = stashed(work)
    return (1 - share) * tokens * s.ffn / tp + share * (mine * s.expert_ffn + tokens * s.shared_ffn / tp)


def waiting_gradients(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch whose gradients of weights are put off: what each matrix took, and the
    gradient of what it gave; but experts', whose gradients never wait."""
    s, c, share = work.sizes, work.cut, work.mixed
    query, kv = widths(work)
    latent = 2 * s.latents + (s.heads * (s.head_dim + s.values) + s.raised) / c.tp
    attention = 2 * s.hidden + np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv)
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    return c.item * work.tokens * (attention + (columns > 0) * (2 * s.hidden + s.matrices * columns / c.tp))


def inside(work: Work) -> Num:
    """Bytes of gradients at the widest place of a block's backward pass: the residual's, and those inside of its MLP, or
    what attention under cp has there; in other systems of all that the MLP has."""
    s, c, share, mine = work.sizes, work.cut, work.mixed, known(work)
    residual, around = c.item * work.tokens * s.hidden, meeting(work)
    rows = work.tokens * s.per_token * fullest(work) / c.tp
    routed = rows * np.maximum((s.matrices - 1) * s.expert_ffn, s.expert_ffn + 2 * s.hidden)
    mlp = c.item * ((1 - share) * work.tokens * (s.matrices - 1) * s.ffn / c.tp + share * routed)
    widest = residual / np.where(c.sp, c.tp, 1) + np.maximum(mlp, around)
    if np.all(mine):
        return widest
    return np.where(mine, widest, 2 * residual + np.maximum(c.item * s.matrices * activated(work), around))


def meeting(work: Work) -> Num:
    """Bytes that attention under cp has in a backward pass beside what was kept: keys and values of others as they arrive
    and in order, and the fp32 sums of gradients, which travel too (plan/memory/activations.py counts the same)."""
    c = work.cut
    if not np.any(c.cp > 1):
        return 0.0
    query, kv = widths(work)
    arriving = np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 6 * kv)
    sums = query + np.where(c.gathers > 0, 2 * kv * (2 * c.cp + 1), 8 * kv)
    ring = c.item * arriving + 4 * sums
    return work.tokens * np.where(c.cp > 1, np.where(c.ulysses > 0, c.item * (query + 2 * kv), ring), 0.0)
