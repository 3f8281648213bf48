"""Answers to what users ask of a plan: how much more fits, how many GPUs for a deadline, what links are worth."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.grid import grid
from weft.plan.machine import Cluster
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import search
from weft.plan.show.waterfall import slower
from weft.plan.time.curves import Curves
from weft.plan.work import Software
from weft.units import duration, gibibytes

MOST_GPUS = 65536
"""Where questions for a number of GPUs end."""
MOST_SEQUENCES = 4096
"""Where that for the largest micro-batch does."""


class Answer(NamedTuple):
    """What was asked, the answer in words, and the layout that goes with it."""

    question: str
    answer: str
    layout: Layout | None = None


@dataclass(frozen=True)
class Question:
    """Of one model, cluster and job; and of one layout alone, where it is named."""

    shape: Shape
    job: Job
    cluster: Cluster
    software: Software
    layout: Layout | None = None

    def best(
        self, job: Job | None = None, cluster: Cluster | None = None, software: Software | None = None
    ) -> Plan | None:
        """The fastest plan that fits, with another job, cluster or software where one is given."""
        found = search(self.shape, job or self.job, cluster or self.cluster, software or self.software)
        return next(iter(found.best(1)), None)

    def asked(
        self, job: Job | None = None, cluster: Cluster | None = None, software: Software | None = None
    ) -> Plan | None:
        """As `best`; or of the layout that was named, if it fits."""
        if self.layout is None:
            return self.best(job, cluster, software)
        plan = self.plan(self.layout, job, cluster, software)
        return plan if plan is not None and plan.fits else None

    def plan(
        self, layout: Layout, job: Job | None = None, cluster: Cluster | None = None, software: Software | None = None
    ) -> Plan | None:
        """Of this layout, whether it fits or not; None where it does not go with the model, the job or the cluster."""
        try:
            return Plan.of(self.shape, layout, job or self.job, cluster or self.cluster, software or self.software)
        except ValueError:
            return None

    def largest_micro_batch(self, plan: Plan) -> tuple[int, Plan | None]:
        """Sequences in one pass with which this layout still fits, and the plan with them, of a batch that they divide; 0
        where not even one does."""

        def fitting(size: int) -> Plan | None:
            layout = plan.layout.model_copy(update={"micro_batch": size})
            round_ = size * layout.replicas * layout.pp
            job = self.job.model_copy(update={"global_batch": -(-self.job.global_batch // round_) * round_})
            found = self.plan(layout, job)
            return found if found is not None and found.fits else None

        size = bisect_left(range(1, MOST_SEQUENCES + 1), True, key=lambda size: fitting(size) is None)
        return size, fitting(size) if size else None

    def longest_sequence(self) -> tuple[int, Plan] | None:
        """Tokens, by doubling, with as many tokens in a step, but a sequence for each replica; and the layout for it. Of
        learned positions no model has more than it was made with."""
        found, seq, batch = None, self.job.seq, self.job.global_batch
        least = self.layout.replicas * (self.layout.micro_batch or 1) if self.layout else 1
        most = self.shape.max_seq if self.shape.positions == "learned" else 2**24
        while batch >= least and seq <= most:
            plan = self.asked(self.job.model_copy(update={"seq": seq, "global_batch": batch}))
            if plan is None:
                break
            found = (seq, plan)
            seq, batch = 2 * seq, max(batch // 2, least) if self.layout else batch // 2
        return found

    def gpus_for(self, days: float) -> Plan | None:
        """The fewest GPUs that see the job's tokens in so many days: a part of a node, by powers of two, or whole nodes, in
        steps of an eighth of the next power of two; None where no number does."""
        node = self.cluster.per_node
        part = (2**power for power in range(17) if 2**power < node)
        whole = (node * 2**power for power in range(17) if node * 2**power <= MOST_GPUS)
        gpus = next((number for number in (*part, *whole) if self._done(number, days)), None)
        if gpus is None:
            return None
        fewer = (gpus * eighths // 8 for eighths in (5, 6, 7, 8) if eighths == 8 or gpus * eighths % (8 * node) == 0)
        return next(plan for number in fewer if (plan := self._done(number, days)))

    def gpus_to_fit(self) -> Plan | None:
        """The best plan on twice as many GPUs, four times, …: the first that fits; None where no number does."""
        gpus = 2 * self.cluster.gpus
        while gpus <= MOST_GPUS:
            if plan := self._on(gpus):
                return plan
            gpus *= 2
        return None

    def more_gpus(self) -> Iterator[Answer]:
        """What number would do, where nothing fits or nothing can be cut so."""
        if not self._cuts(self.cluster.gpus):
            near = " or ".join(f"{gpus:,}" for gpus in self.numbers_near()) or "none near"
            yield Answer(f"{self.cluster.units} near {self.cluster.gpus:,} over which model and batch can be cut", near)
        elif more := self.gpus_to_fit():
            answer = f"{self.number(more)}, {duration(more.seconds)} a step, {self.each(more)}"
            answer += tightly(more)
            yield Answer(f"{self.cluster.units} on which it fits", answer, more.layout)
        else:
            less = "take shorter sequences, or a larger batch, which can be shared out over more"
            yield Answer(f"{self.cluster.units} on which it fits", f"no number up to {MOST_GPUS:,}: {less}")

    def numbers_near(self) -> list[int]:
        """The next smaller and larger numbers of GPUs over which this model and batch can be cut at all."""
        found = []
        for direction in (-1, 1):
            numbers = range(self.cluster.gpus + direction, self.cluster.gpus + 65 * direction, direction)
            found += [next((gpus for gpus in numbers if gpus > 0 and self._cuts(gpus)), 0)]
        return [gpus for gpus in found if gpus]

    def number(self, plan: Plan) -> str:
        return f"{plan.cluster.gpus:,} {plan.cluster.units if plan.cluster.gpus > 1 else plan.cluster.unit}"

    def each(self, plan: Plan) -> str:
        return f"{gibibytes(plan.bytes)} a {plan.cluster.unit}"

    def _done(self, gpus: int, days: float) -> Plan | None:
        """The best plan on so many GPUs, if it is done in time."""
        plan = self._on(gpus)
        return plan if plan is not None and plan.days <= days else None

    def _cuts(self, gpus: int) -> bool:
        return len(grid(self.shape, self.job, self._cluster(gpus), {})["tp"]) > 0

    def _on(self, gpus: int) -> Plan | None:
        return self.best(cluster=self._cluster(gpus))

    def _cluster(self, gpus: int) -> Cluster:
        return self.cluster.model_copy(update={"gpus": gpus})

    def slower_links(self) -> Iterator[tuple[str, Plan | None]]:
        """The plan if the network, or NVLink, gave a half or a quarter; on a measured cluster, all messages."""
        curves = self.cluster.curves
        near = "NVLink" if self.cluster.runs_on == "cuda" else "memory between processes"
        links = {"messages": "curves"} if curves else {"network": "network_gb_per_s", near: "nvlink_gb_per_s"}
        for what, field in links.items():
            for share, word in ((0.5, "half"), (0.25, "a quarter")):
                less: float | Curves = share * getattr(self.cluster, field) if curves is None else slowed(curves, share)
                yield f"{what} at {word}", self.asked(cluster=self.cluster.model_copy(update={field: less}))

    def smaller_moments(self) -> Plan | None:
        """The plan with optimizer.states = 8bit: a byte for each moment, and a scale for each 256 of them. None where
        nothing fits, where the CPU has them, and on a measured cluster, whose update is that of whole moments."""
        if self.cluster.curves or (self.layout and self.layout.offload_optimizer):
            return None
        software = replace(self.software, moments=2 * (1 + 4 / 256))
        if self.layout is not None:
            return self.asked(software=software)
        small = search(self.shape, self.job, self.cluster, software)
        return next((plan for plan in small.best(10) if not plan.layout.offload_optimizer), None)

    def busier_expert(self, plan: Plan) -> Plan | None:
        """The same layout, if the busiest expert were given twice what it is; None where it cannot be given so much."""
        return self.plan(plan.layout, self.job.model_copy(update={"busiest_expert": 2 * self.job.busiest_expert}))

    def answers(self, plan: Plan | None, days: float | None, *, what_if: bool) -> Iterator[Answer]:
        """GPUs where these are too few, largest batch, longest sequence, GPUs for a deadline, 8-bit moments, slower links,
        a busier expert.

        Args:
            plan: what is asked about; None: there is none that fits.
        """
        if plan is None or not (plan.fits or self.best()):
            yield from self.more_gpus()
        if what_if and plan is not None:
            size, largest = self.largest_micro_batch(plan)
            yield Answer("largest micro-batch of this layout", f"{size or 'none fits'}{tightly(largest)}")
        if what_if and (longest := self.longest_sequence()):
            of = "longest sequence of this layout" if self.layout else "longest sequence, as many tokens a step"
            yield Answer(of, f"{longest[0]:,}{tightly(longest[1])}", longest[1].layout)
        if days is not None:
            found = self.gpus_for(days)
            answer = f"no number up to {MOST_GPUS:,}: a larger batch can be shared out over more"
            if found:
                answer = f"{self.number(found)}, {found.days:.1f} days{tightly(found)}"
            yield Answer(
                f"{self.cluster.units} for {days:g} day{'s' if days != 1 else ''}",
                answer,
                found.layout if found else None,
            )
        if what_if and (small := self.smaller_moments()):
            answer = f"{slower(small, plan)} time" if plan else "fits"
            answer += f", {self.each(small)}{tightly(small)}"
            yield Answer("optimizer.states = 8bit", answer, small.layout)
        if what_if and plan is not None:
            for what, other in self.slower_links():
                if other is not None:
                    answer = f"{slower(other, plan)} time"
                    yield Answer(what, answer, other.layout)
        if what_if and plan is not None and self.shape.experts and (uneven := self.busier_expert(plan)):
            answer = f"{slower(uneven, plan)} time, {self.each(uneven)}"
            answer += tightly(uneven) if uneven.fits else ": does not fit"
            yield Answer(f"busiest expert given {uneven.job.busiest_expert:g} times its share", answer, uneven.layout)


def tightly(plan: Plan | None) -> str:
    """What is to be added where a plan fits, and may run out of memory."""
    return ", tightly" if plan is not None and not plan.sure else ""


def slowed(curves: Curves, share: float) -> Curves:
    """With messages at this share of their rates."""
    return curves.model_copy(update={"message_scale": curves.message_scale / share})
