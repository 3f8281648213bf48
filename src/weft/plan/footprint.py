"""The memory of the fullest process, in closed form, for a search over many layouts. Torch-free.

plan/memory.py counts weft's own steps moment by moment; this is the same in a few terms, and for other systems too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from weft.plan.block import parameters
from weft.plan.constants import CONSTANTS as C
from weft.plan.work import Machine, Num, Work


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        weights, gradients, optimizer: this process's share of each.
        gathered: whole weights of the blocks at work, under ZeRO-3, and low-precision copies.
        activations: kept for backward, of all micro-batches in flight.
        working: what one block needs while it is computed, or computed again.
        logits: with their gradient and the loss's workspace.
        outside: context, communicators, workspaces.
        host: in the CPU's memory; no part of `total`.
    """

    weights: Num
    gradients: Num
    optimizer: Num
    gathered: Num
    activations: Num
    working: Num
    logits: Num
    outside: Num
    host: Num = 0.0

    def fits(self, machine: Machine) -> Num:
        """Whether a GPU holds it, with what the allocator cannot use, and its part of the CPU's memory the rest."""
        return (self.total <= C.usable * machine.memory) & (self.host <= C.usable * machine.host_memory)

    @property
    def allocated(self) -> Num:
        """What an allocator reports: all but what it does not see."""
        return self.total - self.outside

    @property
    def spread(self) -> Num:
        """How near this is: as that of the time. Activations are known worse than states."""
        return 0.06 + 0.14 * self.activations / self.total

    @property
    def total(self) -> Num:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def block_activations(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch: Korthikanti et al. 2022, section 4, by the block's own sizes."""
    s, c, soft = work.sizes, work.cut, work.software
    tokens, tp = work.tokens, c.tp
    wide = tokens / np.where(c.sp, tp, 1)
    query, kv = s.heads * s.head_dim / tp, np.maximum(1, s.kv_heads / tp) * s.head_dim
    share = work.mixed
    # two norms' inputs and outputs; queries, keys, values, the result; the MLP's two or three inner states. Computed again
    # are all but what products and attention give
    cheap = c.selective * (soft.flash > 0)
    hidden = (4 - 2 * cheap) * s.hidden * wide
    states = s.matrices - cheap
    latent = 2 * s.latents + (2 * s.heads * s.head_dim + 2 * s.heads * s.value_dim) / tp
    inner = tokens * np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv)
    ffn = tokens * states * s.ffn / tp
    mine = tokens / tp * s.per_token
    routed = mine * (2 * s.hidden + states * s.expert_ffn) + tokens * states * s.shared_ffn / tp
    kept = c.item * (hidden + inner + (1 - share) * ffn + share * routed) + tokens * s.heads / tp * 4
    # one kernel, one result: of activations, rotary positions, and norms
    activated = (1 - share) * tokens * s.ffn / tp + share * (mine * s.expert_ffn + tokens * s.shared_ffn / tp)
    eager = activated + np.where(soft.fused_norm > 1, 0.0, tokens * (query + kv))
    eager = eager + np.where(soft.fused_norm > 0, 0.0, 4 * s.hidden * wide)
    more = np.where((soft.fused > 0) | (s.matrices == 2), 0.0, eager * (1 - cheap))
    more = more + soft.copies * s.hidden * tokens / tp + c.sp * soft.keeps_gathered * 2 * s.hidden * (tokens - wide)
    masks = soft.dropout * 2 * s.hidden * wide
    scores = np.where(soft.flash, 0.0, c.micro_batch * s.heads / tp * s.seq**2 / c.cp * (2 * c.item + soft.dropout))
    every = kept + c.item * more + masks + np.where(c.selective > 0, 0.0, scores)
    given = tokens * (query + 2 * kv) + 2 * s.hidden * wide + (s.matrices - 1) * activated  # by products
    second = c.item * (s.hidden * wide + tokens * query + given / 2) + tokens * s.heads / tp * 4
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    sent = np.where(tp > 1, 2 * s.hidden * (tokens + c.sp * wide), 0.0)
    results = tokens * (2 * query + 2 * kv + (s.matrices - 1) * columns / tp + s.hidden * (1 + (columns > 0)))
    third = c.item * (s.hidden * wide + results + sent) + tokens * s.heads / tp * 4
    kinds = [c.selective * soft.alternate > 0, c.selective * soft.results > 0]
    return np.select(kinds, [second + 0 * every, third + 0 * every], every)


def waiting_gradients(work: Work) -> Num:
    """Bytes that one block keeps of one micro-batch whose gradients of weights are put off: what each matrix took, and the
    gradient of what it gave; but experts', whose gradients never wait."""
    s, c, share = work.sizes, work.cut, work.mixed
    query, kv = s.heads * s.head_dim / c.tp, np.maximum(1, s.kv_heads / c.tp) * s.head_dim
    latent = 2 * s.latents + (s.heads * (s.head_dim + s.values) + s.raised) / c.tp
    attention = 2 * s.hidden + np.where(s.kv_rank > 0, latent, 2 * query + 2 * kv)
    columns = (1 - share) * s.ffn + share * s.shared_ffn
    return c.item * work.tokens * (attention + (columns > 0) * (2 * s.hidden + s.matrices * columns / c.tp))


def footprint(work: Work, *, first: bool = False) -> Footprint:
    """Of the fullest process, or of the first stage's, which is the one that most systems report."""
    s, c, soft = work.sizes, work.cut, work.software
    common, experts, table = parameters(work)
    head = np.where(soft.balanced, s.vocab * s.hidden / c.tp / (common + experts), 0.0)  # is worth so many blocks
    most = (s.layers + head) / c.pp
    with_head = np.clip(
        np.floor(most - head + 0.5), c.vp, s.layers
    )  # blocks of that process; the others share the rest
    others = np.ceil((s.layers - with_head) / np.maximum(1, c.pp - 1))
    blocks = np.clip(
        np.where((soft.balanced > 1) & (c.pp > 1), np.maximum(with_head, others), np.ceil(most)), 1, s.layers
    )
    tables = table * np.where(c.pp > 1, 1.0, 2 - s.tied) + s.positions * s.hidden
    held = blocks * (common + experts) + tables
    shards = c.fsdp * c.cp
    expert_shards = np.maximum(1, shards * c.tp / np.maximum(1, c.ep * c.etp))
    shared = (blocks * common + tables) / shards + blocks * experts / expert_shards
    apart = (c.zero == 3) | ((c.zero > 0) & (soft.weights > c.item))  # ZeRO 1 and 2 shard what is not computed with
    here = 1 - c.away
    weights = here * soft.weights * np.where(apart, shared, held)
    goes = (c.zero >= 2) | ((c.zero == 0) & (c.away > 0))  # FSDP over one process brings them down too
    gradients = soft.gradients * np.where(goes, here * shared, held)
    states = np.where(c.zero >= 1, shared, held)
    optimizer = here * (1 - c.moments_away) * (soft.master + soft.moments) * states
    copies = np.where(soft.weights > c.item, c.item, 0.0)
    gathered = np.where(
        c.zero == 3, 2 * (common + experts) * np.minimum(c.item, soft.weights) + tables * c.item, copies * held
    )
    gathered = gathered + (c.zero == 3) * table * c.item  # the head's gradient waits whole until all others are reduced

    gathered = gathered + c.away * soft.weights * (common + experts) / shards  # a share that has come up to be gathered

    kept = block_activations(work)
    one = work.tokens * s.hidden * c.item / np.where(c.sp, c.tp, 1)
    per_block = c.full * one + (1 - c.full) * kept
    flying = np.minimum(work.micro_batches, c.flying)
    waiting = np.minimum(flying, c.put_off)
    put_off = waiting * waiting_gradients(work)
    later = (flying - waiting) * per_block + put_off
    most = np.maximum(flying * per_block, later)
    activations = np.where(c.offload > 0, np.minimum(2, flying * blocks) * per_block + blocks * put_off, blocks * most)
    host = c.offload * flying * blocks * per_block
    copied = soft.gradients + soft.moments + np.where(soft.master > 0, soft.master, soft.weights)
    host = host + c.away * shared * (soft.weights + soft.gradients + soft.master + soft.moments)
    host = host + c.moments_away * states * copied
    # gradients inside of a block's MLP, while all else is still kept; where the logits are, these are larger and gone
    share = work.mixed
    inner = (1 - share) * s.ffn / c.tp + share * (s.expert_ffn * s.per_token / c.etp / c.tp + s.shared_ffn / c.tp)
    inner = c.item * work.tokens * (s.matrices * inner + 2 * s.hidden)
    logits = soft.logits * work.tokens * s.vocab / c.tp
    logits = np.where(c.chunked, logits / 16, logits)
    # the first stage of a pipeline has most in flight, the last has the logits
    fewer = np.where(soft.balanced > 0, np.clip(s.layers - (c.pp - 1) * blocks, 1, blocks), blocks)
    vee = (c.put_off > 0) & (c.vp > 1)  # there and back: the first process has the last stage too
    behind = np.minimum(flying, 1.0) * per_block + np.maximum(0.0, waiting - 1) * waiting_gradients(work)
    last = np.where(c.pp > 1, np.where(vee, blocks * flying * per_block, fewer * behind), activations)
    # one block is on its way while the logits are there, and two when they are gone
    last = np.where(c.offload > 0, activations - np.minimum(activations / 2, logits), last)
    front = np.where(c.pp > 1, activations, 0.0)
    logits_last = last + logits
    leads = (front >= logits_last) | first
    top = np.where(leads & (c.pp > 1), front, logits_last)
    shown = np.where(leads | (c.pp == 1), activations, last)
    there = top - shown
    again = np.where(c.full > 0, kept, 0.0)
    working = again + np.maximum(0.0, inner - there)
    # FSDP2 has a block's gradients as they came and as they are reduced, beside all that the block does; or until then what
    # those of the tables were reduced from, in the pass before
    whole = replace(work, cut=replace(c, selective=0 * c.selective))
    again = again + np.where(c.selective > 0, block_activations(whole) - kept, 0.0)
    reduced = (c.item + soft.reduced) * (common + experts) + c.away * soft.reduced * (common + experts) / shards
    reduced = np.maximum(reduced, (c.zero != 1) * (work.micro_batches > 1) * soft.reduced * tables)
    fsdp2 = np.maximum(0.0, again + inner + reduced - there)
    working = np.where((soft.weights > c.item) & (soft.alternate == 0), fsdp2, working)
    # what was put off is made for all blocks of a stage, and then reduced, when what it was made of is gone
    made, done = blocks * (common + experts), waiting_gradients(work) * blocks / c.vp
    made = np.maximum(c.item * made, np.where(c.zero == 1, 0.0, soft.gradients * made - done))
    made = (c.put_off > 0) * (soft.weights > c.item) * made - blocks * (most - later) * (c.offload == 0)
    working = np.maximum(working + 2 * work.tokens * s.hidden * c.item, made)
    axes = 1.0 * (c.tp > 1) + (c.pp > 1) + (c.cp > 1) + (c.replicas > 1)
    return Footprint(
        weights=weights, gradients=gradients, optimizer=optimizer, gathered=gathered, activations=shown, working=working,
        logits=top - shown, outside=C.outside + C.communicator * axes, host=host,
    )  # fmt: skip
