"""What a block keeps of one micro-batch for its backward pass, in closed form. Torch-free."""

from __future__ import annotations

import numpy as np

from weft.plan.block import widths
from weft.plan.imbalance import fullest
from weft.plan.work import Num, Work


def block_activations(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch: Korthikanti et al. 2022, section 4, by the block's own sizes."""
    s, c, soft = work.sizes, work.cut, work.software
    tokens, tp = work.tokens, c.tp
    wide = tokens / np.where(c.sp, tp, 1)
    query, kv = widths(work)
    share = work.mixed
    # two norms' inputs and outputs; queries, keys, values, the result; the MLP's two or three inner states. Computed again
    # are all but what products and attention give
    cheap = c.selective * (soft.flash > 0)
    hidden = (4 - 2 * cheap) * s.hidden * wide
    states = s.matrices - cheap
    raised = np.where(soft.raises_again, s.value_dim, 2 * s.head_dim + 2 * s.value_dim)  # or the result alone
    latent = 2 * s.latents + s.heads * raised / tp
    inner = tokens * np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv)
    ffn = tokens * states * s.ffn / tp
    mine = tokens / tp * s.per_token * fullest(work)  # as if one process had most in every block
    routed = mine * ((2 - soft.weighs) * s.hidden + states * s.expert_ffn) + tokens * states * s.shared_ffn / tp
    kept = c.item * (hidden + inner + (1 - share) * ffn + share * routed) + tokens * s.heads / tp * 4
    # what products in 8 bits took is kept in 8 bits: after norms, before experts, and after activations
    activated = (1 - share) * tokens * s.ffn / tp + share * (mine * s.expert_ffn + tokens * s.shared_ffn / tp)
    took = (1 - cheap) * (2 * s.hidden * wide + activated) + share * mine * s.hidden
    kept = kept - soft.keeps8 * c.fp8 * (c.item - 1) * took
    # one kernel, one result: of activations, rotary positions, and norms, which else keep what they take and what comes
    # of it in fp32: with it 16 more of Hagemann's layouts that ran out of memory are said to, and 4 more of those that ran
    eager = activated + np.where(soft.fused_norm > 1, 0.0, tokens * (query + kv))
    eager = eager + np.where(soft.fused_norm > 0, 0.0, 6 * s.hidden * wide)
    more = np.where((soft.fused > 0) | (s.matrices == 2), 0.0, eager * (1 - cheap))
    more = more + soft.copies * s.hidden * tokens / tp + c.sp * soft.keeps_gathered * 2 * s.hidden * (tokens - wide)
    masks = soft.dropout * 2 * s.hidden * wide
    scores = np.where(soft.flash, 0.0, c.micro_batch * s.heads / tp * s.seq**2 / c.cp * (2 * c.item + soft.dropout))
    every = kept + c.item * more + masks + np.where(c.selective > 0, 0.0, scores)
    # or every second product is computed again, as torchtitan has it
    given = tokens * (query + 2 * kv) + 2 * s.hidden * wide + (s.matrices - 1) * activated  # by products
    second = c.item * (s.hidden * wide + tokens * query + given / 2) + tokens * s.heads / tp * 4
    # or the results of products stay, and what came over the network, as weft has it
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    sent = np.where(tp > 1, 2 * s.hidden * (tokens + c.sp * wide), 0.0)
    dealt = (query + kv) * (1 + s.values / s.head_dim) * tokens  # queries and keys, values and results, over heads
    sent = sent + np.where((c.cp > 1) & (c.ulysses > 0), dealt, 0.0)
    results = tokens * (2 * query + 2 * kv + (s.matrices - 1) * columns / tp + s.hidden * (1 + (columns > 0)))
    stay = c.item * (s.hidden * wide + results + sent) + tokens * s.heads / tp * 4
    # or, of products, only those around attention
    around = c.item * (query + 2 * kv) + (soft.remakes < 2) * (c.item * query + s.heads / tp * 4)
    named = c.item * (1 + (soft.remakes < 3)) * s.hidden * wide + tokens * around
    kinds = [c.selective * soft.alternate > 0, c.selective * soft.results > 0, c.selective * soft.remakes > 0]
    return np.select(kinds, [second + 0 * every, stay + 0 * every, named + 0 * every], every)


def waiting_gradients(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch whose gradients of weights are put off: what each matrix took, and the
    gradient of what it gave; but experts', whose gradients never wait."""
    s, c, share = work.sizes, work.cut, work.mixed
    query, kv = widths(work)
    latent = 2 * s.latents + (s.heads * (s.head_dim + s.values) + s.raised) / c.tp
    attention = 2 * s.hidden + np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv)
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    return c.item * work.tokens * (attention + (columns > 0) * (2 * s.hidden + s.matrices * columns / c.tp))
