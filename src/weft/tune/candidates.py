"""Candidates: the layouts that a plan thinks best for a run, in weft's terms. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.plan.machine import Cluster
from weft.plan.memory.moments import Device, largest, layout_memory
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import search
from weft.plan.time.step import Time
from weft.tune.lesson import Lesson

LOOKED_AT = 400
"""Of a search, those of its order that are timed one by one."""
KEPT = ("precision", "gradients", "compile")
"""Of a layout, what a search does not decide: it stays as the run has it."""
ASKED = ("loss", "offload", "offload_weights", "offload_optimizer")
"""What it decides, unless the run asks for it."""


def kept_of(layout: Layout) -> dict[str, object]:
    """What every layout that is tried has of the run's own."""
    asked = {name: value for name in ASKED if (value := getattr(layout, name)) != Layout.model_fields[name].default}
    return {name: getattr(layout, name) for name in KEPT} | asked


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it.

    Attributes:
        time: of a step, part by part.
        memory: bytes of the fullest process: of tensors on a GPU, resident on a CPU.
    """

    layout: Layout
    time: Time
    memory: int

    @property
    def seconds(self) -> float:
        return float(self.time.total)


class Candidates:
    """All that a search finds for a run on a cluster, each timed on its own; and the run's own layout.

    Attributes:
        own: the run's layout, where it takes all of the cluster; it need not fit by the plan.
    """

    def __init__(self, config: Config, cluster: Cluster, device: Device) -> None:
        self.config, self.cluster, self.device = config, cluster, device
        self.job = Job(seq=config.seq, global_batch=config.train.global_batch)
        found = search(config.model, self.job, cluster)
        kept = kept_of(config.layout)
        self.plans: dict[Layout, Plan] = {}  # by what they come to
        for index in found.fastest[:LOOKED_AT]:
            try:
                layout = Layout.model_validate({**found.layout(int(index)).model_dump(), **kept})
                if self._settled(layout) not in self.plans:
                    self.plans[self._settled(layout)] = self._plan(layout)
            except ValueError:
                continue  # weft does not run it, or not in this precision
        self.own = config.layout if config.layout.world == cluster.gpus else None
        if self.own is not None:  # under the name that the user gave it
            self.plans[self._settled(self.own)] = self._plan(self.own)

    def best(self, count: int, lesson: Lesson, tried: Collection[Layout] = ()) -> list[Candidate]:
        """Of those that fit, the fastest by the plan and by what trials have shown of it; one of each cut, which tells more
        than the same cut with another micro-batch, as long as there are cuts that were not tried.
        """
        ranked = sorted(self.plans.values(), key=lambda plan: lesson.expected(plan.time))
        chosen: dict[Layout, Candidate] = {}
        cuts = set(map(_cut, tried))
        for any_cut in (False, True):
            for plan in ranked:
                if len(chosen) == count:
                    break
                layout = plan.layout
                if layout in tried or layout in chosen or (_cut(layout) in cuts and not any_cut):
                    continue
                one = self._candidate(plan)
                if one.memory <= self.cluster.memory:
                    chosen[layout] = one
                    cuts.add(_cut(layout))
        return sorted(chosen.values(), key=lambda one: lesson.expected(one.time))

    def first(self, count: int) -> list[Candidate]:
        """Before anything was tried: the best `count`, the fastest first, and the run's own layout.

        Raises:
            ValueError: none fits.
        """
        best = self.best(count, Lesson.none())
        if not best:
            raise ValueError(
                f"no layout of this model fits {self.cluster.gpus} processes of {self.cluster.memory_gib:.3g} GiB that "
                "`weft plan layouts` looks at: lower train.global_batch or train.seq, or take a larger cluster"
            )
        named = {one.layout for one in best}
        return best if self.own is None or self.own in named else [*best, self.of(self.own)]

    def of(self, layout: Layout) -> Candidate:
        """Raises: ValueError: weft does not run it, or not with this model and batch."""
        return self._candidate(self.plans.get(self._settled(layout)) or self._plan(layout))

    def time(self, layout: str) -> Time | None:
        """What the plan says of one of these, by its text."""
        return next((plan.time for plan in self.plans.values() if str(plan.layout) == layout), None)

    def _plan(self, layout: Layout) -> Plan:
        return Plan.of(self.config.model, layout, self.job, self.cluster)

    def _settled(self, layout: Layout) -> Layout:
        """With its micro-batch as a number."""
        return layout.model_copy(update={"micro_batch": layout.micro_batch_size(self.job.global_batch)})

    def _candidate(self, plan: Plan) -> Candidate:
        cut = self.config.model_copy(update={"layout": plan.layout})
        peak = largest(layout_memory(cut, self.device)).peak
        return Candidate(plan.layout, plan.time, peak.total if self.device == "cpu" else peak.tensors)


def _cut(layout: Layout) -> Layout:
    """How the model is cut, whatever goes through it at once."""
    return layout.model_copy(update={"micro_batch": None, "recompute": "none"})
