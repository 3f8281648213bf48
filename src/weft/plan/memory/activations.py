"""Bytes of activations: what a micro-batch leaves behind for its backward pass. Torch-free.

Counted from the model's own operations, as autograd keeps them (a test compares the two): the count of Korthikanti et
al., Reducing Activation Recomputation in Large Transformer Models (2022), section 4, without dropout, with flash
attention, and with each family's own norm, positions and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.config.layout import Layout
from weft.config.precision import FP8
from weft.config.recompute import Recompute
from weft.models.cuts import even_split
from weft.models.shape import Experts, Shape
from weft.plan.memory.latent import LatentPass

ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number of the computation."""
FLOAT, LONG = 4, 8
HEAD_ALIGNED = 64
"""What a row of logits is rounded up to: models/head.py."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch on one process: how many bytes each kind of tensor takes.

    Attributes:
        tokens: of the micro-batch, cut over cp.
        hidden: the residual stream, [B, T, D], T cut over cp, and under sp further.
        whole: the same without the cut of sp, as the matrices of a region get it.
        query, kv, ffn: what column matrices give, cut over tp.
        logits: [B, T, V], cut over tp, in rows rounded up.
        statistics: of one norm over `hidden`.
        head_statistics: of one fp32 number for each token and head.
        mask: of attention, where plain causal does not say it all; every block keeps its own. Under cp only ulysses
            has one: the others make it tile by tile.
        away: what blocks keep lies in the CPU's memory, and that is not the device's.
        experts: those that take the MLP's place. A stage with both kinds of blocks is counted as if all had experts.
    """

    shape: Shape
    layout: Layout
    tokens: int
    hidden: int
    whole: int
    query: int
    kv: int
    ffn: int
    logits: int
    statistics: int
    head_statistics: int
    mask: int
    experts: Experts | None
    away: bool

    @classmethod
    def of(
        cls,
        shape: Shape,
        layout: Layout,
        micro_batch: int,
        seq: int,
        document_mask: bool = False,
        blocks: Sequence[int] = (0,),
        device: str = "cpu",
    ) -> Pass:
        tokens, item = micro_batch * seq // layout.cp, ITEM[layout.compute]
        parts = layout.tp if layout.sp else 1
        vocab = -(-even_split(shape.vocab, layout.tp, 0)[1] // HEAD_ALIGNED) * HEAD_ALIGNED
        windowed = shape.sliding_window is not None and shape.sliding_window < seq
        masks = micro_batch if document_mask else int(windowed)
        masks = masks if layout.cp == 1 or layout.cp_kind == "ulysses" else 0
        return cls(
            shape=shape,
            layout=layout,
            tokens=tokens,
            hidden=item * tokens * shape.hidden // parts,
            whole=item * tokens * shape.hidden,
            query=item * tokens * shape.num_heads * shape.head_dim // layout.tp,
            kv=item * tokens * shape.num_kv_heads * shape.head_dim // layout.tp,
            ffn=item * tokens * shape.ffn // layout.tp,
            logits=item * tokens * vocab,
            statistics=(2 * item if shape.norm == "layernorm" else FLOAT) * tokens // parts,
            head_statistics=FLOAT * tokens * shape.num_heads // layout.tp,
            mask=item * masks * seq * seq,
            experts=shape.experts if any(map(shape.has_experts, blocks)) else None,
            away=layout.offload and device != "cpu",
        )

    @property
    def number(self) -> int:
        """Of one number of every token."""
        return ITEM[self.layout.compute] * self.tokens

    @property
    def block(self) -> int:
        """Everything that one block's backward needs, its input among it."""
        # each norm keeps its input, the second's is the middle of the block, and the matrices behind it what it gives
        norms = 2 * (self.hidden + self.statistics + self.whole)
        return norms + self.attention + self.mlp

    def part(self, name: str) -> int:
        """What attention or the MLP, each with its norm, keeps beside the residual stream; or experts beside what is dealt
        out to them."""
        if name == "experts":
            return self.inside(self.experts) if self.experts else 0
        return self.statistics + self.whole + int(getattr(self, name))

    @property
    def attention(self) -> int:
        """q, k, v, the result and its log-sum-exp; q and k before their norms, and those norms' own statistics."""
        if self.latent is not None:
            size = self.latent.attention + self.head_statistics + self.mask
            return size + (self.latent.result if self.layout.cp > 1 and self.layout.cp_kind == "ulysses" else 0)
        size = 2 * self.query + 2 * self.kv + self.head_statistics + self.mask
        if self.shape.qk_norm:
            kv_heads = self.shape.num_kv_heads / self.shape.num_heads
            size += self.query + self.kv + int(self.head_statistics * (1 + kv_heads))
        by_head = self.layout.cp > 1 and self.layout.cp_kind == "ulysses"
        return size + by_head * self.query  # the result, before and after it was cut by token again

    @property
    def meeting(self) -> int:
        """What attention under cp has beside that for a moment, in backward: keys and values of other processes as they
        arrive and in order, and the fp32 sums of gradients, which travel too; see parallel/context.py."""
        layout, fp32 = self.layout, FLOAT / ITEM[self.layout.compute]
        if layout.cp == 1:
            return 0
        if layout.cp_kind == "ulysses":
            return self.query + 2 * self.kv
        held = 2 * self.kv * (2 * layout.cp if layout.cp_kind == "allgather" else 2)
        sums = 2 * self.kv * (2 * layout.cp + 1 if layout.cp_kind == "allgather" else 4)
        return int(2 * self.kv + held + fp32 * (sums + self.query))

    @property
    def mlp(self) -> int:
        """gelu: before and after. swiglu: the gate, its silu, the other matrix, and the product of both; a compiled block
        makes the silu again."""
        if self.experts:
            return self.mixture(self.experts)
        return (4 - self.layout.compile if self.shape.activation == "swiglu" else 2) * self.ffn

    def mixture(self, experts: Experts) -> int:
        """Beside its input: an fp32 copy of that and of the router's matrix, the scores, the choices and their weights;
        and of each token's experts what goes in, gate, its silu, the other matrix, the product, and that weighted.
        """
        rows, item = self.rows(experts), ITEM[self.layout.compute]
        routed = self.tokens // self.layout.tp
        copies = (FLOAT - item) * routed + (FLOAT * experts.num_experts if item < FLOAT else 0)
        normed = FLOAT * (routed * experts.per_token + routed) if experts.norm_topk else 0
        router = copies * self.shape.hidden + FLOAT * routed * experts.num_experts + normed
        router += 2 * LONG * routed * experts.per_token
        routed_rows = item * rows * (self.shape.hidden + 1) + self.inside(experts)
        apart = self.shared and (item < FLOAT or self.layout.tp > 1)  # then what they take is not what the router does
        return router + routed_rows + 4 * self.shared + (item * routed * self.shape.hidden if apart else 0)

    def inside(self, experts: Experts) -> int:
        """Of each token's experts: gate, its silu, the other matrix, the product, and that weighted."""
        return ITEM[self.layout.compute] * self.rows(experts) * 5 * experts.ffn // self.layout.expert_tp

    @property
    def shared(self) -> int:
        """What each column matrix of the shared experts gives."""
        return self.number * self.shape.shared_ffn // self.layout.tp if self.experts else 0

    @property
    def latent(self) -> LatentPass | None:
        return LatentPass.of(self.shape, self.layout, self.number, self.tokens) if self.shape.latent else None

    def rows(self, experts: Experts) -> int:
        """Pairs of a token and its expert that this process works on, where every expert gets as many."""
        return self.tokens * experts.per_token * self.layout.expert_tp // self.layout.tp

    @property
    def recompute(self) -> Recompute:
        return Recompute.parse(self.layout.recompute)

    @property
    def kept(self) -> int:
        """What a block that is recomputed keeps from forward to backward."""
        recompute = self.recompute
        if recompute.redone:
            return self.block - sum(map(self.part, recompute.redone))
        results = {
            "matmul": self.products,
            "attention": self.query + self.head_statistics,
            "network": 0,
        }
        if self.layout.tp > 1:  # two sums, or under sp two gathers and two scatters
            results["network"] = 2 * (self.whole + self.hidden) if self.layout.sp else 2 * self.whole
            # what goes into a message that is kept has no use
            results["matmul"] -= self.whole if "network" in recompute.keeps else 0
        if not self.experts:  # nor has the block's own result
            results["matmul"] -= self.whole
            results["network"] -= self.hidden if self.layout.tp > 1 else 0
        if self.layout.cp > 1 and self.layout.cp_kind == "ulysses":
            results["network"] += 2 * self.query + 2 * self.kv
        return self.hidden + sum(results[name] for name in recompute.keeps)

    @property
    def recomputed(self) -> int:
        """What the backward pass of a block that is recomputed makes again at once."""
        if redone := self.recompute.redone:
            return max(map(self.part, redone))
        return max(0, self.block - self.kept)

    def blocks(self, count: int, held: int | None = None) -> int:
        """What the first `held` of the `count` blocks of a stage keep; all of them by default."""
        held = 0 if self.away else count if held is None else held
        again = sum(index < held for index in self.recompute.blocks(count))
        return again * self.kept + (held - again) * self.block

    @property
    def moving(self) -> int:
        """With offload: what a block that is at work keeps, and that of the one that is fetched meanwhile."""
        first = next(iter(self.recompute.blocks(2)), None) == 0
        all_again = first and self.recompute.every == 1 and self.recompute.first is None
        return 2 * (self.kept if all_again else self.block) if self.layout.offload else 0

    @property
    def backward(self) -> int:
        """Gradients at the widest place of a block's backward pass: the residual's, and those inside of the MLP, or what
        attention under cp has there."""
        mlp = (2 if self.shape.activation == "swiglu" else 1) * self.ffn
        if self.experts:
            rows, ffn = self.rows(self.experts), self.experts.ffn // self.layout.expert_tp
            mlp = ITEM[self.layout.compute] * rows * max(2 * ffn, ffn + 2 * self.shape.hidden)
        return self.hidden + max(mlp, self.meeting) + (self.quantized if self.layout.precision in FP8 else 0)

    @property
    def quantized(self) -> int:
        """Of the two operands of a product in fp8: one in 8 bits, the other scaled, in 8 bits, and laid out by columns."""
        matrix = ITEM["bf16"] * self.shape.hidden * max(self.shape.ffn, self.shape.hidden) // self.layout.tp
        return self.ffn // 2 + 2 * max(self.ffn, self.whole, matrix)

    @property
    def products(self) -> int:
        """What the matrices of a block give; but those of its experts."""
        columns = self.shared if self.experts else self.ffn
        mlp = (self.shape.mlp_matrices - 1) * columns + self.whole if columns else 0
        attention = self.latent.products if self.latent else self.query + 2 * self.kv
        return attention + self.whole + mlp

    @property
    def put_off(self) -> int:
        """What one block keeps for gradients of matrices that are put off: the input of each, and the gradient of what
        it gave."""
        columns = self.shared if self.experts else self.ffn  # the experts' own never wait
        attention = self.whole + (self.latent.inputs if self.latent else self.query)
        return attention + (self.whole + columns if columns else 0) + self.products

    @property
    def last(self) -> int:
        """After the last block: the final norm's input and statistics, and the head's input; without the logits."""
        return self.hidden + self.statistics + self.whole
