"""One block of weft's model with one micro-batch, operation by operation, timed by measured curves. Torch-free.

plan/time/step.py has the same in closed form, for any system and for a search; here are the very calls of models/ and
parallel/, so that what they take can be looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.config.layout import Layout
from weft.config.recompute import Recompute
from weft.models.shape import Experts, Shape
from weft.plan.time.curves import Curves
from weft.plan.time.imbalance import fullest_share

KINDS = ("matmul", "attention", "elementwise", "tp", "cp", "ep")
ITEM = {"fp32": 4, "bf16": 2}
FLOAT, LONG = 4, 8
FORWARD, BACKWARD, WEIGHTS = range(3)
"""The ways of a pass. The backward of products is in two: gradients of their inputs, and of their weights."""


@dataclass
class Parts:
    """Seconds of each way, by kind; and of the way forward, by kind, those of `result`: what comes after the last thing
    that the backward pass needs, which is not computed again."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [0.0] * 3 for kind in KINDS})
    result: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def add(self, kind: str, way: int, seconds: float, *, result: bool = False) -> None:
        self.seconds[kind][way] += seconds
        if result and way == FORWARD:
            self.result[kind] += seconds

    def __add__(self, other: Parts) -> Parts:
        pairs = {kind: zip(self.seconds[kind], other.seconds[kind], strict=True) for kind in KINDS}
        results = {kind: self.result[kind] + other.result[kind] for kind in KINDS}
        return Parts({kind: [a + b for a, b in pair] for kind, pair in pairs.items()}, results)

    def __mul__(self, factor: float) -> Parts:
        results = {kind: factor * seconds for kind, seconds in self.result.items()}
        return Parts({kind: [factor * time for time in ways] for kind, ways in self.seconds.items()}, results)

    def total(self, *ways: int, kinds: Iterable[str] = KINDS) -> float:
        return sum(self.seconds[kind][way] for kind in kinds for way in ways)


class BlockCount:
    """Counts what one process does with one micro-batch.

    Args:
        tokens: of the micro-batch on this process, cut over cp.
        seq: tokens of a whole sequence.
        busiest: what the busiest expert is given, in even shares.
    """

    def __init__(
        self, shape: Shape, layout: Layout, curves: Curves, tokens: float, seq: int, busiest: float = 1
    ) -> None:
        self.shape, self.layout, self.curves, self.tokens, self.seq = shape, layout, curves, tokens, seq
        self.busiest = busiest
        self.precision = "fp32" if layout.compute == "fp32" else "bf16"
        self.item = ITEM[self.precision]
        self.wide = tokens * shape.hidden / (layout.tp if layout.sp else 1)
        self.whole = tokens * shape.hidden
        self.query = shape.num_heads * shape.head_dim // layout.tp
        self.kv = shape.num_kv_heads * shape.head_dim // layout.tp

    # -- operations ---------------------------------------------------------------------------------------------------

    def op(self, name: str, *sizes: float) -> float:
        """Seconds of an operation in the precision of the computation."""
        return self.curves.compute(f"{name}_{self.precision}", *sizes)

    def product(self, parts: Parts, m: float, n: float, k: float, count: float = 1, *, result: bool = False) -> None:
        for way, name in enumerate(("forward", "input", "weights")):
            parts.add("matmul", way, count * self.op(f"product_{name}", m, n, k), result=result)

    def both(self, parts: Parts, name: str, numbers: float) -> None:
        parts.add("elementwise", FORWARD, self.op(f"{name}_forward", numbers))
        parts.add("elementwise", BACKWARD, self.op(f"{name}_backward", numbers))

    def norm(self, parts: Parts) -> None:
        self.both(parts, self.shape.norm, self.wide)

    def message(self, name: str, ways: int, numbers: float) -> float:
        return self.curves.message(f"{name}_{self.precision}", ways, self.item * numbers)

    # -- a block ------------------------------------------------------------------------------------------------------

    def block(self, experts: bool) -> dict[str, Parts]:
        """Attention and the MLP, each with its norm and residual; and what of the MLP is experts' work alone."""
        attention, (mlp, inside) = self.attention_part(), self.mlp_part(experts)
        return {"attention": attention, "mlp": mlp, "experts": inside}

    def attention_part(self) -> Parts:
        shape, parts, n = self.shape, Parts(), self.tokens
        self.norm(parts)
        for columns in (self.query, self.kv, self.kv):
            self.product(parts, n, columns, shape.hidden)
        if shape.qk_norm:
            for columns in (self.query, self.kv):
                self.both(parts, "rmsnorm", n * columns)
        if shape.positions == "rotary":
            for columns in (self.query, self.kv):
                self.both(parts, "rope", n * columns)
        self.attend(parts)
        self.product(parts, n, shape.hidden, self.query, result=True)
        parts.add("elementwise", BACKWARD, 2 * self.op("add", self.whole))  # the gradients of q, k and v meet
        self.edges(parts)
        return parts

    def mlp_part(self, experts: bool) -> tuple[Parts, Parts]:
        shape, layout, parts, n = self.shape, self.layout, Parts(), self.tokens
        self.norm(parts)
        if experts:
            assert shape.experts is not None
            inside = self.mixture(parts, shape.experts)
            parts.add("elementwise", FORWARD, self.op("add", self.wide), result=True)
            parts.add("elementwise", BACKWARD, self.op("add", self.wide))
            return parts + inside, inside
        ffn = shape.ffn // layout.tp
        for _ in range(shape.mlp_matrices - 1):
            self.product(parts, n, ffn, shape.hidden)
        self.both(parts, shape.activation, n * ffn)
        self.product(parts, n, shape.hidden, ffn, result=True)
        parts.add("elementwise", BACKWARD, (shape.mlp_matrices - 2) * self.op("add", self.whole))
        self.edges(parts)
        return parts, Parts()

    def edges(self, parts: Parts) -> None:
        """The residual, and what tp does where a region begins and ends."""
        parts.add("elementwise", FORWARD, self.op("add", self.wide), result=True)
        parts.add("elementwise", BACKWARD, self.op("add", self.wide))
        if self.layout.tp == 1:
            return
        names = ("all_gather", "reduce_scatter") if self.layout.sp else ("all_reduce",)
        for way in (FORWARD, BACKWARD):
            for name in names:
                # what travels is laid out for it before, or after
                copied = self.op("copy", self.whole)
                seconds = self.message(name, self.layout.tp, self.whole) + copied
                parts.add("tp", way, seconds, result=name != "all_gather")

    # -- attention ----------------------------------------------------------------------------------------------------

    def attend(self, parts: Parts) -> None:
        shape, layout, cp = self.shape, self.layout, self.layout.cp
        sequences = self.tokens * cp / self.seq
        heads = shape.num_heads / layout.tp
        window = shape.sliding_window is not None and shape.sliding_window < self.seq
        by_head = cp > 1 and layout.cp_kind == "ulysses"
        if cp == 1 or by_head:
            rows, length, tiles = sequences * heads / cp, self.seq, 2.0 if window else 1.0  # masked, all is worked out
        else:  # of the 2·cp chunks of a sequence each process has two; a whole tile is as much as two causal ones
            rows, length, tiles = sequences * heads, self.seq // (2 * cp), 4.0 * cp
        for way, name in ((FORWARD, "forward"), (BACKWARD, "backward")):
            parts.add("attention", way, rows * tiles * self.op(f"attention_{name}", length, shape.head_dim))
        if cp > 1:
            (self.by_head if by_head else self.in_parts)(parts)

    def by_head(self, parts: Parts) -> None:
        """Four all-to-alls each way, laid out before and after."""
        for way in (FORWARD, BACKWARD):
            for columns in (self.query, self.kv, self.kv, self.query):
                numbers = self.tokens * columns
                parts.add("cp", way, self.message("all_to_all", self.layout.cp, numbers) + 2 * self.op("copy", numbers))

    def in_parts(self, parts: Parts) -> None:
        """Keys and values of others come in, results of tiles are merged; in backward gradients go home in fp32."""
        cp, n = self.layout.cp, self.tokens
        keys, numbers = 2 * n * self.kv, n * self.query
        merges = 2 * cp - 1 if self.layout.cp_kind == "ring" else 1
        ring = self.layout.cp_kind == "ring"
        arrive = (cp - 1) * self.message("send", 2, keys) if ring else self.message("all_gather", cp, cp * keys)
        home = (cp * self.curves.message("send_fp32", 2, FLOAT * keys) if ring
                else self.curves.message("reduce_scatter_fp32", cp, FLOAT * cp * keys))  # fmt: skip
        compute = self.curves.compute
        laid_out = self.op("copy", keys) + (0.0 if ring else self.op("copy", cp * keys))
        sums = compute("fill_fp32", cp * keys) + compute("accumulate_fp32", cp * keys + merges * numbers)
        merged = merges * 4 * self.op("add", numbers / 2)
        parts.add("cp", FORWARD, arrive + laid_out + merged + self.op("copy", numbers))
        parts.add("cp", BACKWARD, arrive + home + laid_out + sums + compute("copy_fp32", cp * keys + numbers))

    # -- experts ------------------------------------------------------------------------------------------------------

    def mixture(self, parts: Parts, experts: Experts) -> Parts:
        """Router, the way to the experts and the way back are added to `parts`, and what they do comes back: on the process
        that has most to do for its experts, since all others wait."""
        shape, layout = self.shape, self.layout
        routed = self.tokens / layout.tp
        mine = routed * layout.expert_tp  # gathered over etp
        blocks = shape.num_layers - experts.dense_layers
        rows = mine * experts.per_token * float(fullest_share(self.busiest, experts.num_experts, blocks, layout.ep))
        inside, compute = self.inside(experts, rows), self.curves.compute
        for way, name in enumerate(("forward", "input", "weights")):
            sizes = routed, experts.num_experts, shape.hidden
            parts.add("matmul", way, compute(f"product_{name}_fp32", *sizes))
        parts.add("elementwise", FORWARD, compute("sort_fp32", mine))
        for way in (FORWARD, BACKWARD):
            # dealt out, brought together; and under ep put in order twice
            parts.add("elementwise", way, self.op("add", rows * shape.hidden))
            moves = 2 + 2 * (layout.ep * layout.expert_tp > 1)
            parts.add("elementwise", way, moves * self.op("rows", rows * shape.hidden))
            for back in (False, True):
                parts.add("ep", way, self.message("all_to_all", layout.ep, rows * shape.hidden), result=back)
            parts.add("ep", way, self.message("all_to_all", layout.ep, rows))
            if layout.expert_tp > 1:
                whole = mine * shape.hidden
                parts.add("ep", way, self.message("all_gather", layout.expert_tp, whole))
                parts.add("ep", way, self.message("reduce_scatter", layout.expert_tp, whole), result=True)
        parts.add("ep", FORWARD, self.curves.message("all_to_all_fp32", layout.ep, LONG * experts.num_experts))
        if layout.tp > 1 and not layout.sp:
            for way in (FORWARD, BACKWARD):
                parts.add("tp", way, self.message("all_gather", layout.tp, self.whole), result=True)
        return inside

    def inside(self, experts: Experts, rows: float) -> Parts:
        """Experts' products and activations, and what weighs them."""
        parts, held, ffn = Parts(), experts.num_experts / self.layout.ep, experts.ffn // self.layout.expert_tp
        for _ in range(2):
            self.product(parts, rows / held, ffn, self.shape.hidden, held)
        self.both(parts, "swiglu", rows * ffn)
        for way, times in ((FORWARD, 1), (BACKWARD, 2)):
            parts.add("elementwise", way, times * self.op("add", rows * ffn))
        # torch's own kernel keeps what it takes before it begins, ours when it is done: models/grouped.py
        early = self.curves.device == "cuda" and self.precision == "bf16"
        self.product(parts, rows / held, self.shape.hidden, ffn, held, result=early)
        return parts


def again(recompute: Recompute, parts: dict[str, Parts]) -> float:
    """Seconds of what one block computes a second time, where it is one that does."""
    if recompute.redone:
        return sum(parts[name].total(FORWARD) - sum(parts[name].result.values()) for name in recompute.redone)
    network = ("tp", "cp", "ep")
    kept = [kind for kind in KINDS if kind in recompute.keeps or ("network" in recompute.keeps and kind in network)]
    done = [kind for kind in KINDS if kind not in kept]
    whole, mlp = parts["attention"] + parts["mlp"], parts["mlp"]
    return whole.total(FORWARD, kinds=done) - sum(mlp.result[kind] for kind in done)
