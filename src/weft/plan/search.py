"""Every layout of a model on a cluster, as columns: who fits, who is fast, who would fit if. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.columns import rows
from weft.plan.grid import (
    AXES,
    CP_KINDS,
    KINDS,
    LOOPED,
    LOSSES,
    OFFLOADS,
    OTHER,
    RECOMPUTES,
    SCHEDULES,
    cut_of,
    grid,
    settled,
    with_savings,
)
from weft.plan.machine import Cluster
from weft.plan.memory.footprint import footprint
from weft.plan.numbers import WEFT, Job, sizes
from weft.plan.plan import Plan
from weft.plan.time.block import Passes
from weft.plan.time.constants import CONSTANTS
from weft.plan.time.counted import check_curves
from weft.plan.time.step import step_time
from weft.plan.work import Cut, Num, Software, Work

COUNTED = 200  # layouts whose steps are, where a cluster has been measured: plan/time/counted.py


@dataclass(frozen=True)
class Search:
    """All candidates: `columns` of AXES, and what they come to. `fastest`: those that fit, in order of their time; `order`:
    those that surely do, and after them the others."""

    shape: Shape
    job: Job
    cluster: Cluster
    software: Software
    columns: dict[str, Num]
    seconds: Num
    bytes: Num
    fits: Num
    sure: Num

    @cached_property
    def fastest(self) -> Num:
        fitting = np.flatnonzero(self.fits)
        return fitting[np.argsort(self.seconds[fitting], kind="stable")]

    @cached_property
    def order(self) -> Num:
        return self.fastest[np.argsort(~self.sure[self.fastest], kind="stable")]

    def __len__(self) -> int:
        return len(self.seconds)

    def layout(self, index: int) -> Layout:
        """Raises: ValueError: weft does not run it."""
        one = {name: column[index] for name, column in self.columns.items()}
        tp, cp, pp = int(one["tp"]), int(one["cp"]), int(one["pp"])
        replicas = self.cluster.gpus // (tp * cp * pp)
        kind = KINDS[int(one["kind"])]
        shards = {"dp": 1, "hsdp": self._node(tp * cp, replicas)}.get(kind, replicas)
        schedule = SCHEDULES[int(one["schedule"])]
        layout = Layout(
            dp=replicas // shards, fsdp=shards, zero={"zero1": 1, "zero2": 2}.get(kind, 3) if shards > 1 else 3, tp=tp,
            sp=bool(one["sp"]), cp=cp, cp_kind=CP_KINDS[int(one["cp_kind"])] if cp > 1 else "allgather", pp=pp,
            vp=int(one["vp"]) if schedule in LOOPED else 1, schedule=schedule, ep=int(one["ep"]),
            etp=int(one["etp"]) if self.shape.experts and tp > 1 else None, micro_batch=int(one["micro_batch"]),
            precision="fp8" if self.job.matmul == "fp8" else self.cluster.precision,
            recompute=RECOMPUTES[int(one["recompute"])], offload=one["offload"] == 1,
            offload_weights=one["offload"] == 2, offload_optimizer=one["offload"] == 3, loss=LOSSES[int(one["loss"])],
        )  # fmt: skip
        layout.check(self.shape, self.job.global_batch, self.job.seq)
        return layout

    def _node(self, inner: int, replicas: int) -> int:
        return int(np.gcd(replicas, max(1, self.cluster.nvlink_domain // inner)))

    def plan(self, layout: Layout) -> Plan:
        return Plan.of(self.shape, layout, self.job, self.cluster, self.software)

    def layouts(self, indices: Sequence[int] | Num) -> Iterator[tuple[int, Layout]]:
        """Those of these that weft runs, one after the other."""
        for index in indices:
            with suppress(ValueError):
                yield int(index), self.layout(int(index))

    def first(self, indices: Sequence[int] | Num, count: int) -> list[tuple[int, Plan]]:
        """The first of these that weft runs."""
        return [(index, self.plan(layout)) for index, layout in islice(self.layouts(indices), count)]

    @cached_property
    def counted(self) -> list[tuple[int, Plan]]:
        """On a measured cluster the first COUNTED of the order, counted one by one, and in the order of that."""
        if self.cluster.curves is None:
            return []
        return sorted(self.first(self.order, COUNTED), key=lambda found: (not found[1].sure, found[1].seconds))

    @cached_property
    def told(self) -> Num:
        """Seconds, where all are told at once: what was counted, and of all others as much more or less than in closed
        form as it is of these."""
        if not self.counted:
            return self.seconds
        rows, seconds = [row for row, _ in self.counted], np.array([plan.seconds for _, plan in self.counted])
        told = self.seconds * np.median(seconds / self.seconds[rows])
        told[rows] = seconds
        return told

    def ranked(self, count: int) -> list[tuple[int, Plan]]:
        return self.counted[:count] or self.first(self.order, count)

    def best(self, count: int = 10) -> list[Plan]:
        """The fastest."""
        return [plan for _, plan in self.ranked(count)]

    def tight(self, winner: Plan) -> Plan | None:
        """What is faster than a winner that surely fits, and may run out of memory."""
        between = self.fastest[~self.sure[self.fastest]][:50] if winner.sure else []
        found = next((plan for _, plan in self.first(between, 1)), None)
        return found if found and found.seconds < winner.seconds else None

    def rivals(self) -> list[tuple[str, Plan]]:
        """For each axis, the best layout with another value than the winner's: what would have been chosen instead."""
        winners = self.ranked(1)
        if not winners:
            return []
        winner, _ = winners[0]
        found = []
        for axis in AXES:
            column = self.columns[axis]
            counted = [(index, plan) for index, plan in self.counted if column[index] != column[winner]]
            others = self.order[column[self.order] != column[winner]]
            for index, plan in counted[:1] or self.first(others[:50], 1):
                found.append((f"{axis.replace('_', ' ')} {_word(axis, int(column[index]))}", plan))
        return found

    def nearest(self) -> tuple[Plan, Plan | None, list[str]] | None:
        """The fastest layout that does not fit, or where none does, the smallest; the one with fewest changes that does;
        and these changes."""
        failing = np.flatnonzero(~self.fits)
        bounds = self.seconds[self.order[0]] if len(self.order) else np.inf
        failing = failing[self.seconds[failing] < bounds] if len(self.order) else failing
        short = failing[np.argsort((self.seconds if len(self.order) else self.bytes)[failing])]
        found, best = self.first(short[:200], 1), self.best(1)
        if not found or (best and found[0][1].seconds >= best[0].seconds):
            return None
        index, plan = found[0]
        near = self.closest({axis: int(column[index]) for axis, column in self.columns.items()})
        return (plan, *near) if near else (plan, None, [])

    def closest(self, row: dict[str, int]) -> tuple[Plan, list[str]] | None:
        """The layout that fits with the fewest changes to a row of the columns, and these; None where nothing fits."""
        differing = sum((column != row[axis]).astype(int) for axis, column in self.columns.items())
        order = self.order[np.argsort(differing[self.order], kind="stable")]
        for other, plan in self.first(order[:200], 1):
            after = {axis: int(column[other]) for axis, column in self.columns.items()}
            return plan, [
                " ".join(filter(None, (axis.replace("_", " "), _word(axis, row[axis]), "→", _word(axis, after[axis]))))
                for axis in AXES
                if row[axis] != after[axis]
            ]
        return None


def _word(axis: str, value: int) -> str:
    switch = ("off", "on")
    names = {
        "kind": KINDS, "recompute": RECOMPUTES, "schedule": SCHEDULES, "cp_kind": CP_KINDS, "loss": LOSSES, "sp": switch,
        "offload": OFFLOADS,
    }.get(axis)  # fmt: skip
    if value == OTHER:
        return ""
    return names[value] if names else str(value)


def search(shape: Shape, job: Job, cluster: Cluster, software: Software = WEFT, **fixed: int) -> Search:
    """Every layout over all axes, predicted at once; those that do not surely fit with all that saves memory, too.

    Args:
        fixed: axes that are settled, by name: tp=8.

    Raises:
        ValueError: the cluster's curves know nothing of such a model.
    """
    if cluster.curves is not None:
        check_curves(shape)
    columns = grid(shape, job, cluster, fixed)
    machine, model = cluster.machine(), sizes(shape, job)
    held = footprint(Work(model, cut_of(shape, columns, job, cluster), machine, software))
    full = ~held.sure(machine)
    nearly = full & (held.total - held.optimizer <= CONSTANTS.usable * machine.memory)
    columns = settled(with_savings(columns, full, nearly, cluster.gpus, shape.experts is not None), fixed)
    work = Work(model, cut_of(shape, columns, job, cluster), machine, software)
    held = footprint(work)
    there = np.flatnonzero(held.host <= CONSTANTS.usable * machine.host_memory + 0 * work.cut.tp)
    columns = {axis: column[there] for axis, column in columns.items()}
    work, held = replace(work, cut=rows(work.cut, there)), rows(held, there)
    total = np.asarray(held.total)
    fits = np.asarray(held.fits(machine))
    near = np.flatnonzero(fits | (total < 1.6 * cluster.memory))  # the rest is far from fitting: not worth its time
    seconds = np.full(len(total), np.inf)
    cut = rows(work.cut, near)
    # to a microsecond: what takes as long stays in the grid's order, however a machine rounds
    seconds[near] = np.round(step_time(replace(work, cut=cut), _passes(work, cut)).total, 6)
    return Search(shape, job, cluster, software, columns, seconds, total, fits, np.asarray(held.sure(machine)))


def _passes(work: Work, cut: Cut) -> Passes:
    """One micro-batch through a block depends on few axes: each of their combinations is timed once."""
    key = 0 * cut.tp
    for name in ("tp", "sp", "cp", "gathers", "ulysses", "micro_batch", "ep", "etp"):
        values, place = np.unique(getattr(cut, name), return_inverse=True)
        key = key * len(values) + place
    _, first, back = np.unique(key, return_index=True, return_inverse=True)
    return Passes.of(replace(work, cut=rows(cut, first))).rows(back)
