"""Pipeline schedules, alone and side by side: who waits, and what is held. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.recompute import Recompute
from weft.config.tree import Config
from weft.models.shape import Shape
from weft.plan.memory.activations import Pass
from weft.plan.memory.passes import in_flight, kept_bytes
from weft.plan.memory.stage import stages
from weft.schedules.formula import published_bubble
from weft.schedules.orders import ORDERS, make_schedule
from weft.schedules.sheet import read_sheet
from weft.schedules.table import LOOPED, V_SCHEDULES, Schedule, peaks
from weft.schedules.timeline import Costs, Stages, Timeline, timeline


@dataclass(frozen=True)
class ScheduleReport:
    """A schedule, what its operations take, and the model that they are of, where there is one."""

    schedule: Schedule
    costs: Stages
    config: Config | None = None

    @cached_property
    def line(self) -> Timeline:
        return timeline(self.schedule, self.costs)

    @property
    def published(self) -> float | None:
        """Share of waiting by formula; None where stages are not equal, or none is known."""
        if isinstance(self.costs, tuple):
            return None
        table = self.schedule
        return published_bubble(table.name, len(table.orders), table.num_chunks, table.num_micro_batches, self.costs)

    @property
    def waiting(self) -> list[float]:
        """Share of the time in which each process waits."""
        return [1 - sum(end - start for _, start, end in row) / self.line.length for row in self.line.spans]

    @cached_property
    def held(self) -> list[float]:
        """Micro-batches that each process holds at most; one is what all of its stages hold of it."""
        return [most / self.schedule.num_chunks for most in peaks(self.schedule)]

    @cached_property
    def activations(self) -> list[int] | None:
        """Bytes of them, at the moment when they take most; None without a model, or where they depend on a budget."""
        if self.config is None or Recompute.parse(self.config.layout.recompute).budget is not None:
            return None
        layout, train, found = self.config.layout, self.config.train, []
        for stage in stages(self.config.model, layout):
            size = layout.micro_batch_size(train.global_batch)
            one = Pass.of(self.config.model, layout, size, self.config.seq, False, stage.indices)
            logits = one.logits if stage.last and layout.loss == "whole" else 0
            most = in_flight(self.schedule, stage, one, logits)
            found.append(kept_bytes(most, self.schedule, stage, one, logits))
        return found


def named(name: str, pp: int, vp: int, num_micro_batches: int) -> Schedule:
    """A known schedule by its name, or one's own out of a CSV file.

    Raises:
        ValueError: there is none of that name, or it cannot be made so.
    """
    if name.endswith(".csv"):
        return read_sheet(name)
    if name not in ORDERS:
        raise ValueError(f"{name} is no schedule: name one of {', '.join(ORDERS)}, or a .csv file")
    chunks = 2 if name in V_SCHEDULES else vp if name in LOOPED else 1
    return make_schedule(name, pp, chunks, num_micro_batches)


def of_model(schedule: Schedule, model: str, rest: Layout, seq: int) -> ScheduleReport:
    """A schedule as a model's pipeline. `rest`: the layout but for the pipeline.

    Raises:
        ValueError: the model cannot be cut so.
    """
    if rest.pp > 1:
        raise ValueError(f"--layout {rest}: say the pipeline by --pp and by the schedule's name")
    chunks = 1 if schedule.name in V_SCHEDULES else schedule.num_chunks
    size = rest.micro_batch or 1
    pipeline = {"pp": len(schedule.orders), "vp": chunks, "schedule": schedule.name, "micro_batch": size}
    layout = Layout.model_validate({**rest.model_dump(), **pipeline})
    sizes = {"global_batch": size * schedule.num_micro_batches * rest.replicas, "seq": seq}
    config = make_config({"model": {"preset": model}, "layout": layout, "train": sizes})
    return ScheduleReport(schedule, modelled_costs(config), config)


def modelled_costs(config: Config) -> tuple[Costs, ...]:
    """What each stage's operations take, counted in multiplications; a mean stage's forward takes 1.

    A block's forward multiplies with its matrices, and queries with keys and probabilities with values; the backward of its
    input does as much of the first and twice as much of the second, that of its weights as much of the first. The
    head's gradient and those of experts are never put off. The embedding is a lookup.
    """
    shape, parts = config.model, config.layout.stage_blocks(config.model)
    attention = 2 * shape.num_heads * shape.head_dim * _seen(shape, config.seq)
    found = []
    for stage, blocks in enumerate(parts):
        matrices = sum(shape.block_matmul_params(block) for block in blocks)
        routed = sum(_routed(shape) for block in blocks if shape.has_experts(block))
        head = shape.vocab * shape.hidden if stage == len(parts) - 1 else 0
        scores = attention * len(blocks)
        found.append((matrices + head + scores, matrices + 2 * (head + scores) + routed, matrices - routed))
    mean = sum(forward for forward, _, _ in found) / len(found)
    return tuple(Costs(*(part / mean for part in parts)) for parts in found)


def _seen(shape: Shape, seq: int) -> float:
    """Tokens that one token of a sequence sees, in the mean."""
    window = min(seq, shape.sliding_window or seq)
    return window - window**2 / (2 * seq)


def _routed(shape: Shape) -> int:
    """Numbers of the experts that one token meets in a block."""
    return 3 * shape.hidden * shape.experts.ffn * shape.experts.per_token if shape.experts else 0
