"""A step of weft's own on a measured machine: operation by operation, through the pipeline's real table. Torch-free.

memory/moments.py counts the bytes of a step in the same way. What curves do not have is refused or left out: docs/tune.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from weft.config.layout import Layout
from weft.config.recompute import Recompute
from weft.models.parameters import block_sizes
from weft.models.shape import Shape
from weft.plan.memory.activations import HEAD_ALIGNED
from weft.plan.memory.logits import HEAD_ROWS, LOSS_ROWS
from weft.plan.memory.stage import Stage, stages
from weft.plan.numbers import Job
from weft.plan.time.counted_block import BACKWARD, FLOAT, FORWARD, KINDS, WEIGHTS, BlockCount, Parts, again
from weft.plan.time.curves import Curves
from weft.plan.time.step import Time
from weft.schedules.timeline import Costs, timeline

BUCKET_BYTES = 32 * 2**20
"""Of gradients that travel together: parallel/replicate.py."""


@dataclass(frozen=True)
class Chunk:
    """Seconds of one stage with one micro-batch.

    Attributes:
        blocks: all of its blocks.
        ends: embedding, head and loss: forward, backward, gradients of weights.
        redone: of the forward pass, in backward.
        weights: what handling sharded or replicated weights takes in every pass: forward, backward.
    """

    blocks: Parts
    ends: tuple[float, float]
    redone: float
    weights: tuple[float, float]

    @property
    def costs(self) -> Costs:
        forward = self.blocks.total(FORWARD) + self.ends[0] + self.weights[0]
        backward = self.blocks.total(BACKWARD) + self.ends[1] + self.weights[1] + self.redone
        return Costs(forward, backward, self.blocks.total(WEIGHTS))


def check_curves(shape: Shape) -> None:
    """Raises: ValueError: a part of the model that curves know nothing of."""
    if shape.latent is not None:
        raise ValueError(
            "the curves of a measured cluster know nothing of latent attention: plan such a model on a preset's cluster"
        )


def counted_time(shape: Shape, layout: Layout, job: Job, curves: Curves) -> Time:
    """Seconds of a step, on the process that has most to do.

    Raises:
        ValueError: a part of the model or of the layout that curves know nothing of.
    """
    check_curves(shape)
    if layout.precision in ("fp8", "fp8row") or job.matmul == "fp8":
        raise ValueError(f"layout {layout}: the curves of a measured cluster know fp32 and bf16 alone; leave fp8 out")
    return StepCount(shape, layout, job, curves).time()


class StepCount:
    def __init__(self, shape: Shape, layout: Layout, job: Job, curves: Curves) -> None:
        self.shape, self.layout, self.curves = shape, layout, curves
        self.size = layout.micro_batch_size(job.global_batch)
        self.count = layout.num_micro_batches(job.global_batch)
        self.tokens = self.size * job.seq / layout.cp
        self.block = BlockCount(shape, layout, curves, self.tokens, job.seq, job.busiest_expert)
        self.precision = self.block.precision
        self.places = stages(shape, layout)
        self.kinds = {kind: self.block.block(kind) for kind in {*map(shape.has_experts, range(shape.num_layers))}}
        self.recompute = Recompute.parse(layout.recompute)

    def time(self) -> Time:
        chunks = {stage: self.chunk(place, stage) for place in self.places for stage in place.stages}
        busy = [self.busy([chunks[stage] for stage in place.stages]) for place in self.places]
        most = max(range(len(busy)), key=lambda index: busy[index] + self.update(self.places[index]))
        place = self.places[most]
        mine = [chunks[stage] for stage in place.stages]
        sent = self.sent()
        length = busy[most]
        if self.layout.pp > 1:
            costs = [chunks[stage].costs for stage in sorted(chunks)]
            with_sent = tuple(Costs(c.forward + sent, c.input + sent, c.weights) for c in costs)
            length = timeline(self.layout.table(self.count), with_sent).length
        blocks = sum((chunk.blocks for chunk in mine), Parts()) * self.count
        flow = 2 * self.count * len(mine) * sent if self.layout.pp > 1 else 0.0
        each = {kind: blocks.total(FORWARD, BACKWARD, WEIGHTS, kinds=[kind]) for kind in KINDS}
        handled = self.count * sum(sum(chunk.weights) for chunk in mine)
        backward = sum(chunk.costs.input + chunk.costs.weights for chunk in mine)
        return Time(
            **each,
            head=self.count * sum(sum(chunk.ends) for chunk in mine),
            recompute=self.count * sum(chunk.redone for chunk in mine),
            launch=0.0,
            dp=handled + self.once(place, backward),
            pp=flow,
            bubble=max(0.0, length - busy[most] - flow),
            optimizer=self.update(place),
            rest=2 * self.curves.message("all_reduce_fp32", self.layout.world, 16),
        )

    def busy(self, chunks: Sequence[Chunk]) -> float:
        return self.count * sum(c.costs.forward + c.costs.input + c.costs.weights for c in chunks)

    # -- one stage, one micro-batch -----------------------------------------------------------------------------------

    def chunk(self, place: Stage, stage: int) -> Chunk:
        indices = place.stages[stage]
        blocks, redone = Parts(), 0.0
        doing_again = self.recompute.blocks(len(indices))
        for position, index in enumerate(indices):
            parts = self.kinds[self.shape.has_experts(index)]
            blocks = blocks + parts["attention"] + parts["mlp"]
            redone += again(self.recompute, parts) if position in doing_again else 0.0
        forward = backward = 0.0
        if stage == 0:
            forward, backward = self.embedding()
        if stage == self.layout.num_stages - 1:
            head = self.head()
            forward, backward = forward + head[0], backward + head[1]
        return Chunk(blocks, (forward, backward), redone, self.handled(place, stage))

    def embedding(self) -> tuple[float, float]:
        block, layout = self.block, self.layout
        table = self.shape.vocab * self.shape.hidden / layout.tp
        rows = block.op("rows", block.whole)
        sent = 0.0
        if layout.tp > 1:
            sent = block.message("reduce_scatter" if layout.sp else "all_reduce", layout.tp, block.whole)
        back = block.message("all_gather", layout.tp, block.whole) if layout.sp else 0.0
        return rows + sent, self.curves.compute("fill_fp32", table) + rows + back

    def head(self) -> tuple[float, float]:
        """The last norm, the logits and the loss, which makes their gradient in the forward pass."""
        block, shape, layout, tp = self.block, self.shape, self.layout, self.layout.tp
        vocab = ceil(shape.vocab / tp / HEAD_ALIGNED) * HEAD_ALIGNED
        parts = Parts()
        block.norm(parts)
        rows = min(HEAD_ROWS, self.tokens) if layout.loss == "chunked" else self.tokens
        block.product(parts, rows, vocab, shape.hidden, self.tokens / rows)
        loss = self.tokens * block.op("loss", vocab)
        if tp > 1:
            at_once = self.tokens if layout.loss == "whole" and self.curves.device == "cuda" else LOSS_ROWS
            loss += 2 * ceil(self.tokens / at_once) * self.curves.message("all_reduce_fp32", tp, 6 * at_once)
            names = ("all_gather", "reduce_scatter") if layout.sp else ("", "all_reduce")
            for way, name in enumerate(names):
                parts.add("tp", way, block.message(name, tp, block.whole) if name else 0.0)
        scaled = block.whole + vocab * shape.hidden if layout.loss == "chunked" else self.tokens * vocab
        backward = parts.total(BACKWARD, WEIGHTS) + self.curves.compute("scale_fp32", scaled)
        return parts.total(FORWARD) + loss, backward

    def sent(self) -> float:
        """From one stage to the next."""
        return self.block.message("send", 2, self.block.wide) if self.layout.pp > 1 else 0.0

    # -- weights ------------------------------------------------------------------------------------------------------

    def units(self, place: Stage, stage: int) -> list[float]:
        """What is gathered, reduced, or added up at once, in numbers, whole: each block, and the rest."""
        first = sum(len(blocks) for number, blocks in place.stages.items() if number < stage)
        units = [float(numbers) for numbers in place.blocks[first : first + len(place.stages[stage])]]
        root = place.root if len(place.stages) == 1 else place.root / len(place.stages)
        return [*units, *([float(root)] if root else [])]

    def handled(self, place: Stage, stage: int) -> tuple[float, float]:
        """What is done with weights and their gradients in every pass, forward and backward."""
        layout, compute = self.layout, self.curves.compute
        units = self.units(place, stage)
        if not layout.sharded:
            adds = layout.weight_ways[0] > 1 or self.count > 1 or layout.lowered
            return 0.0, sum(compute("accumulate_fp32", numbers) for numbers in units) if adds else 0.0
        forward = backward = 0.0
        if layout.zero == 3 and layout.fsdp > 1:
            forward = sum(map(self.gather, units))
            backward = sum(map(self.gather, units[:-1])) if stage < layout.num_stages else 0.0
        share = 1.0 if layout.zero > 1 or self.count == 1 else 1 / self.count
        backward += share * sum(map(self.reduce, units))
        if share < 1:
            backward += (1 - share) * sum(compute("accumulate_fp32", numbers) for numbers in units)
        return forward, backward

    def gather(self, numbers: float) -> float:
        """Seconds until FSDP2 has a unit's weights in the precision of the computation."""
        ways, block = self.layout.weight_ways[1], self.block
        low = self.curves.compute("lower_fp32", numbers / ways) if self.precision != "fp32" else 0.0
        laid_out = block.op("copy", numbers / ways) + block.op("copy", numbers)
        return self.curves.unit + low + laid_out + block.message("all_gather", ways, numbers)

    def reduce(self, numbers: float) -> float:
        """Seconds until a unit's gradients are added up, and lie where the optimizer finds them."""
        ways, wide = self.layout.weight_ways[1], self.layout.gradients
        laid_out = self.curves.compute("copy_fp32", numbers)
        sent = self.curves.message(f"reduce_scatter_{wide}", ways, (FLOAT if wide == "fp32" else 2) * numbers)
        added = self.curves.compute("accumulate_fp32", numbers / ways) if self.count > 1 else 0.0
        return self.curves.unit + laid_out + sent + added

    def once(self, place: Stage, backward: float) -> float:
        """What is done with weights and gradients once a step. Replicas' sums go beside the last backward pass."""
        layout, curves = self.layout, self.curves
        copies = layout.weight_ways[0]
        seconds = 0.0
        if layout.sharded and not (layout.zero == 3 and layout.fsdp > 1):
            seconds += sum(self.gather(numbers) for stage in place.stages for numbers in self.units(place, stage))
        if layout.lowered:
            seconds += curves.compute("lower_fp32", place.params)
        if copies > 1:
            held = FLOAT * (place.shard if layout.sharded else place.params)
            last = held % BUCKET_BYTES or BUCKET_BYTES
            sums = curves.message("all_reduce_fp32", copies, held)
            hidden = curves.beside * min(sums * (1 - last / held), backward) if held > last else 0.0
            seconds += sums - hidden
            seconds += 0.0 if layout.sharded else curves.compute("fill_fp32", held / FLOAT)
        if self.shape.tied and layout.pp > 1:
            seconds += curves.message("all_reduce_fp32", 2, FLOAT * place.table)
        return seconds

    def update(self, place: Stage) -> float:
        """The norm of the gradients, clipping, and AdamW: tensor by tensor on a CPU, a GPU's kernels take all at once."""
        on_cpu = self.curves.device == "cpu"
        tensors = sum(len(block_sizes(self.shape, index)) for index in place.indices) + 2 if on_cpu else 1
        each = place.shard / tensors
        compute = self.curves.compute
        return tensors * (compute("squares_fp32", each) + compute("scale_fp32", each) + compute("adamw_fp32", each))
