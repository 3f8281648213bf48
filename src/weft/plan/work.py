"""Work: everything that time and memory follow from, as plain numbers or as columns of them. Torch-free.

Every function over a Work is arithmetic on its fields, so one call answers for one layout or for a hundred thousand:
plan/columns.py lays many side by side, and a search fills the fields with columns itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Num = Any
"""A number, or an array with one for each candidate."""


@dataclass(frozen=True)
class Sizes:
    """The model and the job. Counts; `matrices` 3 where the MLP is gated, else 2; `experts` 0 where there are none."""

    layers: Num
    hidden: Num
    heads: Num
    kv_heads: Num
    head_dim: Num
    ffn: Num
    matrices: Num
    vocab: Num
    tied: Num
    positions: Num  # learned ones
    window: Num  # tokens that one sees; the sequence, where there is no window
    experts: Num
    per_token: Num
    expert_ffn: Num
    dense_layers: Num
    seq: Num
    batch: Num
    shared_ffn: Num = 0  # width of the MLP beside the experts
    q_rank: Num = 0  # of latent attention: numbers of the vector that queries are made of; 0: of hidden
    kv_rank: Num = 0  # that keys and values are made of; 0: there is no latent attention
    rope_dim: Num = 0
    value_dim: Num = 0  # of latent attention's heads
    qk_norm: Num = 0  # queries and keys have norms of their own
    busiest: Num = 1  # what the busiest expert of any block is given, in even shares

    @property
    def values(self) -> Num:
        """Numbers of one head's values."""
        return np.where(self.kv_rank, self.value_dim, self.head_dim)

    @property
    def latents(self) -> Num:
        """Numbers of the vectors that latent attention makes queries, keys and values of."""
        return self.q_rank + self.kv_rank + self.rope_dim

    @property
    def raised(self) -> Num:
        """Numbers that latent attention makes of the vector of keys and values, of all heads."""
        return self.heads * (self.head_dim - self.rope_dim + self.value_dim)


@dataclass(frozen=True)
class Cut:
    """A layout. Flags are 0 or 1; `zero` is 0 where nothing is sharded; `full` is the share of blocks that are computed
    again whole, `selective` all but matrices and attention, `redo_…` those parts of them."""

    dp: Num
    fsdp: Num
    zero: Num
    tp: Num
    sp: Num
    cp: Num
    gathers: Num  # cp_kind allgather
    pp: Num
    vp: Num
    ep: Num
    etp: Num
    micro_batch: Num
    full: Num
    selective: Num
    chunked: Num  # loss
    item: Num  # bytes of a number of the computation
    fp8: Num  # matrices multiplied in 8 bits
    flying: Num  # micro-batches that the first stage's process keeps at a time, where there are so many
    every: Num = 1  # of which blocks of a stage `full` is: one of so many,
    first: Num = np.inf  # of the first so many
    redo_attention: Num = 0
    redo_mlp: Num = 0
    redo_experts: Num = 0
    put_off: Num = 0  # micro-batches whose gradients of weights wait at most, on the process that has most of them
    dual: Num = 0  # the pipeline goes there and back, and starts at both ends: dualpipev
    ulysses: Num = 0  # cp_kind
    offload: Num = 0  # of activations
    away: Num = 0  # weights, reduced gradients and moments lie in the CPU's memory, and it updates them
    moments_away: Num = 0  # moments alone do, beside copies of weights and gradients, and it updates those

    @property
    def gpus(self) -> Num:
        return self.dp * self.fsdp * self.cp * self.pp * self.tp

    @property
    def replicas(self) -> Num:
        return self.dp * self.fsdp

    @property
    def vee(self) -> Num:
        """The pipeline goes there and back: its first process has its last stage, too."""
        return (self.put_off > 0) & (self.vp > 1)

    @property
    def shards(self) -> Num:
        """Processes that share a block, or its states."""
        return self.fsdp * self.cp

    @property
    def expert_shards(self) -> Num:
        """Processes that share the same experts."""
        return np.maximum(1, self.shards * self.tp / (self.ep * self.etp))


@dataclass(frozen=True)
class Machine:
    """One GPU and its links. FLOP/s, bytes, bytes/s in one direction, seconds."""

    peak: Num  # dense, 16 bit
    peak8: Num
    gemm: Num  # share of the peak that the best matrix product reaches, 16 bit
    gemm8: Num
    attention: Num  # share of the 16-bit peak that fused attention reaches
    sms: Num
    hbm: Num
    memory: Num
    nvlink: Num
    domain: Num  # GPUs that NVLink joins
    network: Num  # of one GPU
    generation: Num  # 0 Volta, 1 Ampere, 2 Hopper, 3 Blackwell; 4 CDNA 3
    mesh: Num = 0.0  # 1: a GPU's links go to one other each, without a switch
    halves: Num = 0.0  # bytes/s between a node's two CPUs, where its GPUs' messages pass there
    wait: Num = 0.0  # s a node, of a collective over nodes that the computation waits for
    adapter: Num = 0.0  # bytes/s of the one that a group uses, where it does not use all of its members'
    host: Num = 25e9  # bytes/s between a GPU and its CPU's memory
    host_memory: Num = 256e9  # of the CPU, for each GPU
    host_hbm: Num = 50e9  # bytes/s of that memory, for each GPU


@dataclass(frozen=True)
class Software:
    """What a training system does with a layout. 0 or 1 each, unless said.

    Attributes:
        fused: norms and activations are one kernel each.
        fused_norm: norms are, even where activations are not; 2: and rotary positions.
        logits: bytes kept for each, with its gradient: 4 where gradients take the place of logits; 12 where torch's loss
            has three fp32 tables at once: logarithms, their gradients, and those of the logits.
        lean_loss: the loss reads logits twice and writes their gradient once, with no copy in fp32.
        whole_head: every process of tp has the logits of the whole vocabulary for their loss.
        flash: attention never writes its scores: 0.5 FlashAttention of 2022, 1 FlashAttention-2, 2 the best kernels of the
            GPU's generation, 3 those of 2025.
        softmax: keys that its fused softmax takes at most, of scores that are written; it takes four heads at a time.
        overlap_dp: gradients are reduced and weights gathered beside the computation; 0.5: gradients only, and of
            ZeRO-3's half.
        bucket: parameters whose gradients go at a time, and that are gathered at a time; 0: a block's.
        bucket_each: of these at least, for each process that shares them.
        sharded: of the network's rate, what ZeRO-3's messages have.
        overlap_tp: tp's messages go beside the matrix products.
        overlap_pp: stages' messages go beside the computation, where they interleave (Megatron's schedules.py).
        blocking: the CPU waits for each of them.
        waits: it waits for each kernel, too (CUDA_LAUNCH_BLOCKING).
        whole_pp: every process of tp sends the whole of a stage's message, not its part.
        overlap_ep: experts' messages go beside the computation.
        dedup: a node is sent one copy of a token, however many of its experts it goes to.
        routing: part of the traffic of dealing tokens out to experts that no other kernel does on its way.
        graphs: kernels are launched by CUDA graphs, but experts'; 2: those too.
        graphs_route: those that deal tokens out are, not those of each expert.
        dropout: masks are made and kept.
        balanced: the last stage has fewer blocks, for the head is work too; 2: as near to equal work as can be; 3: and
            late stages, which keep fewer micro-batches, have one more than others (Megatron-Core's transformer_block.py).
        adds: each micro-batch's gradients are added up by kernels of their own, not by the products that make them.
        tp_host: s that the CPU takes more for a block cut by tp, both ways.
        least: s that the CPU takes for a block at least, both ways, however few its kernels are.
        stall: s that a micro-batch waits at a boundary of stages.
        keeps_gathered: under sp, what part of the matrices' inputs is kept whole for backward, not gathered again.
        alternate: selective recomputation keeps what attention and every second product gave, and nothing else.
        remakes: it makes the MLP's inner states again by their products; 2: attention's result too; 3: and what the product
            after it gave (MaxText's policies of remat).
        stops: what is computed again ends with the last thing that the backward pass needs, before a part's last product
            (torch.utils.checkpoint without re-entering, since 2.1; a compiler of whole steps).
        results: it keeps what attention, every product but experts' and every message gave, and nothing else.
        products8: of the rate of products in 8 bits, what its libraries have.
        gathers8: weights of products in 8 bits are gathered in 8 bits, too.
        keeps8: what products in 8 bits take is kept in 8 bits, too.
        copies8: bytes of each parameter in 8 bits that stay beside the weights.
        weighs: experts' inner states are weighed, not their results, which need not be kept then; 2: what they were is
            kept, too.
        stash: even shares of tokens, for which there is room at least where experts' inner states are kept.
        raises_again: latent attention makes queries, keys and values again of their short vectors.
        copies: hidden states of each token, cut over tp, that a block keeps beside what its backward pass needs.
        whole_dp: under ZeRO 1 and 2 all processes get all gradients, not their own shares alone.
        once: under ZeRO 2 gradients are reduced once a step, not in every pass.
        freed: gradients are given back after each step; where a step has one micro-batch they come as activations go.
        masks: a window is a mask for every block, a number of the computation for each pair of tokens.
        own_head: the process with the head has what that leaves it, and takes what the head's backward pass does; else it
            is told as if it had as many blocks as any other, and took no more than they.
        turns: s for each process, where under ZeRO 1 and 2 they give their weights to all others one after the other.
        weights, gradients, master, moments: bytes of each parameter.
        reduced: bytes in which a gradient travels.
    """

    fused: Num = 1
    fused_norm: Num = 0
    logits: Num = 8
    lean_loss: Num = 0
    whole_head: Num = 0
    flash: Num = 1
    softmax: Num = np.inf
    overlap_dp: Num = 1
    bucket: Num = 0
    bucket_each: Num = 0
    sharded: Num = 1
    overlap_tp: Num = 0
    overlap_pp: Num = 0
    blocking: Num = 0
    waits: Num = 0
    whole_pp: Num = 0
    overlap_ep: Num = 0
    dedup: Num = 0
    routing: Num = 1
    graphs: Num = 0
    graphs_route: Num = 0
    dropout: Num = 0
    balanced: Num = 0
    adds: Num = 0
    tp_host: Num = 0
    least: Num = 0
    stall: Num = 0
    keeps_gathered: Num = 0
    alternate: Num = 0
    remakes: Num = 0
    stops: Num = 0
    results: Num = 0
    products8: Num = 1
    gathers8: Num = 0
    keeps8: Num = 0
    copies8: Num = 0
    weighs: Num = 0
    stash: Num = 1
    raises_again: Num = 0
    copies: Num = 0
    whole_dp: Num = 0
    once: Num = 0
    freed: Num = 0
    masks: Num = 0
    own_head: Num = 0
    turns: Num = 0
    weights: Num = 2
    gradients: Num = 4
    master: Num = 4
    moments: Num = 8
    reduced: Num = 4


@dataclass(frozen=True)
class Work:
    sizes: Sizes
    cut: Cut
    machine: Machine
    software: Software

    @property
    def tokens(self) -> Num:
        """Of one micro-batch on one process."""
        return self.cut.micro_batch * self.sizes.seq / self.cut.cp

    @property
    def micro_batches(self) -> Num:
        return np.maximum(1, self.sizes.batch / self.cut.replicas / self.cut.micro_batch)

    @property
    def blocks(self) -> Num:
        """Of the process that has most."""
        stages = self.cut.pp * self.cut.vp
        return np.minimum(np.ceil(self.sizes.layers / stages) * self.cut.vp, np.ceil(self.sizes.layers / self.cut.pp))

    @property
    def tables_as_blocks(self) -> Num:
        """Blocks are dealt out to stages as if each table were one: the ends' processes have one less (Llama 3's 126)."""
        layers, pp = self.sizes.layers, self.cut.pp
        return (layers % pp > 0) & ((layers + 2) % pp == 0)

    @property
    def mixed(self) -> Num:
        """Share of blocks with experts, on the process of a pipeline that has most of them."""
        has = np.minimum(1.0, (self.sizes.layers - self.sizes.dense_layers) * self.cut.pp / self.sizes.layers)
        return np.where(self.sizes.experts > 0, has, 0.0)
