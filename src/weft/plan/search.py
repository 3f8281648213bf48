"""Every layout of a model on a cluster, as columns: who fits, who is fast, who would fit if. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import TypeVar

import numpy as np

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.counted import counted_time
from weft.plan.footprint import Footprint, footprint
from weft.plan.machine import Cluster
from weft.plan.numbers import BUBBLE, WEFT, Job, numbers, sizes
from weft.plan.time import Time, step_time
from weft.plan.work import Cut, Num, Software, Work

POWERS = tuple(2**power for power in range(15))
KINDS = ("dp", "zero1", "zero2", "fsdp", "hsdp")
"""How replicas hold the states: whole; ZeRO 1, 2, 3 over all; ZeRO 3 in a node with copies over nodes."""
SCHEDULES = ("1f1b", "interleaved", "zbh1", "zbv")
RECOMPUTES = ("none", "selective", "full")
AXES = ("tp", "sp", "cp", "gathers", "pp", "vp", "schedule", "ep", "kind", "micro_batch", "recompute")
"""What a candidate is made of, a column each; gpus do the rest."""
COUNTED = 200  # layouts whose steps are, where a cluster has been measured: plan/counted.py


@dataclass(frozen=True)
class Plan:
    """One layout, predicted.

    Attributes:
        time: seconds of a step, by what takes them.
        memory: bytes of the fullest process.
    """

    shape: Shape
    layout: Layout
    job: Job
    cluster: Cluster
    software: Software
    time: Time
    memory: Footprint

    @classmethod
    def of(cls, shape: Shape, layout: Layout, job: Job, cluster: Cluster, software: Software = WEFT) -> Plan:
        """Raises: ValueError: the layout does not go with the model, the batch or the number of GPUs."""
        if layout.world != cluster.gpus:
            raise ValueError(f"layout {layout} takes {layout.world:,} GPUs and the cluster has {cluster.gpus:,}")
        layout.check(shape, job.global_batch, job.seq)
        work = numbers(shape, layout, job, cluster, software)
        curves = cluster.curves if software is WEFT else None
        time = counted_time(shape, layout, job, curves) if curves else plain(step_time(work))
        return cls(shape, layout, job, cluster, software, time, plain(footprint(work)))

    @property
    def work(self) -> Work:
        return numbers(self.shape, self.layout, self.job, self.cluster, self.software)

    @property
    def seconds(self) -> float:
        return float(self.time.total)

    @property
    def bytes(self) -> float:
        return float(self.memory.total)

    @property
    def fits(self) -> bool:
        return bool(self.memory.fits(self.cluster.memory))

    @property
    def headroom(self) -> float:
        """Bytes of the GPU's memory that are left."""
        return self.cluster.memory - self.bytes

    @property
    def tokens_per_s(self) -> float:
        return self.job.seq * self.job.global_batch / self.seconds

    def mfu(self, *, causal: bool) -> float:
        """Share of the dense peak of the precision, in model FLOPs."""
        peak = self.cluster.peak_8bit_tflops if self.job.matmul == "fp8" else self.cluster.peak_tflops
        flops = self.shape.flops_per_token(self.job.seq, causal=causal) * self.tokens_per_s
        return flops / (self.cluster.gpus * peak * 1e12)

    @property
    def days(self) -> float:
        return self.job.tokens / self.tokens_per_s / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.cluster.gpus

    @property
    def bound(self) -> str:
        """What takes most beside the computation that any layout has; `compute` where nothing takes a tenth."""
        parts = {field.name: float(getattr(self.time, field.name)) for field in fields(Time)}
        extra = {name: parts[name] for name in WASTE}
        most = max(extra, key=lambda name: extra[name])
        if extra[most] > 0.1 * self.seconds:
            return WASTE[most]
        return "HBM" if parts["elementwise"] + parts["optimizer"] > parts["matmul"] else "compute"


WASTE = {
    "recompute": "recompute", "launch": "launching kernels", "tp": "tp messages", "cp": "cp messages",
    "ep": "ep messages", "dp": "dp/fsdp messages", "pp": "pp messages", "bubble": "bubble",
}  # fmt: skip


Parts = TypeVar("Parts", Time, Footprint)


def plain(parts: Parts) -> Parts:
    """With plain numbers."""
    return type(parts)(*(float(getattr(parts, field.name)) for field in fields(parts)))


@dataclass(frozen=True)
class Search:
    """All candidates: `columns` of AXES, and what they come to. `order`: those that fit, fastest first."""

    shape: Shape
    job: Job
    cluster: Cluster
    software: Software
    columns: dict[str, Num]
    seconds: Num
    bytes: Num
    fits: Num

    @cached_property
    def order(self) -> Num:
        fitting = np.flatnonzero(self.fits)
        return fitting[np.argsort(self.seconds[fitting], kind="stable")]

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
            sp=bool(one["sp"]), cp=cp, cp_kind="ring" if cp > 1 and not one["gathers"] else "allgather", pp=pp,
            vp=int(one["vp"]) if schedule == "interleaved" else 1, schedule=schedule, ep=int(one["ep"]),
            etp=1 if self.shape.experts and tp > 1 else None, micro_batch=int(one["micro_batch"]), precision="bf16",
            recompute=RECOMPUTES[int(one["recompute"])],
        )  # fmt: skip
        layout.check(self.shape, self.job.global_batch, self.job.seq)
        return layout

    def _node(self, inner: int, replicas: int) -> int:
        return int(np.gcd(replicas, max(1, self.cluster.nvlink_domain // inner)))

    def plan(self, index: int) -> Plan:
        return Plan.of(self.shape, self.layout(index), self.job, self.cluster, self.software)

    def first(self, indices: Sequence[int] | Num, count: int) -> list[tuple[int, Plan]]:
        """The first of these that weft runs."""
        found: list[tuple[int, Plan]] = []
        for index in indices:
            try:
                found.append((int(index), self.plan(int(index))))
            except ValueError:
                continue
            if len(found) == count:
                break
        return found

    def best(self, count: int = 10) -> list[Plan]:
        """The fastest. On a measured cluster the first COUNTED of the order are counted one by one, and ordered by that."""
        if self.cluster.curves is None:
            return [plan for _, plan in self.first(self.order, count)]
        return sorted((plan for _, plan in self.first(self.order, COUNTED)), key=lambda plan: plan.seconds)[:count]

    def rivals(self) -> list[tuple[str, Plan]]:
        """For each axis, the best layout with another value than the winner's: what would have been chosen instead."""
        winners = self.first(self.order, 1)
        if not winners:
            return []
        winner, _ = winners[0]
        found = []
        for axis in ("tp", "pp", "cp", "kind", "vp", "schedule", "ep", "micro_batch", "recompute"):
            column = self.columns[axis]
            others = self.order[column[self.order] != column[winner]]
            for index, plan in self.first(others[:50], 1):
                found.append((f"{axis.replace('_', ' ')} {_word(axis, int(column[index]))}", plan))
        return found

    def nearest(self) -> tuple[Plan, Plan | None, list[str]] | None:
        """The fastest layout that does not fit; the one with fewest changes that does; and these changes."""
        failing = np.flatnonzero(~self.fits)
        bounds = self.seconds[self.order[0]] if len(self.order) else np.inf
        failing = failing[self.seconds[failing] < bounds] if len(self.order) else failing
        short = failing[np.argsort(self.seconds[failing])]
        found = self.first(short[:200], 1)
        if not found:
            return None
        index, plan = found[0]
        differing = sum((column != column[index]).astype(int) for column in self.columns.values())
        order = self.order[np.lexsort((self.seconds[self.order], differing[self.order]))]
        for other, change in self.first(order[:200], 1):
            words = [
                f"{axis.replace('_', ' ')} {_word(axis, int(column[index]))} → {_word(axis, int(column[other]))}"
                for axis, column in self.columns.items()
                if column[other] != column[index]
            ]
            return plan, change, words
        return plan, None, []


def _word(axis: str, value: int) -> str:
    names = {"kind": KINDS, "recompute": RECOMPUTES, "schedule": SCHEDULES}.get(axis)
    return names[value] if names else str(value)


def search(shape: Shape, job: Job, cluster: Cluster, software: Software = WEFT, **fixed: int) -> Search:
    """Every layout over all axes, predicted at once.

    Args:
        fixed: axes that are settled, by name: tp=8.
    """
    columns = _grid(shape, job, cluster, fixed)
    work = Work(sizes(shape, job), _cut(columns, job, cluster), cluster.machine(), software)
    held = footprint(work)
    total = np.asarray(held.total)
    fits = np.asarray(held.fits(cluster.memory))
    near = fits | (total < 1.6 * cluster.memory)  # the rest is far from fitting: not worth its time
    seconds = np.full(len(total), np.inf)
    seconds[near] = step_time(replace(work, cut=_rows(work.cut, near))).total
    return Search(shape, job, cluster, software, columns, seconds, total, fits)


def _rows(cut: Cut, mask: Num) -> Cut:
    values = {field.name: getattr(cut, field.name) for field in fields(cut)}
    return Cut(**{name: value[mask] if np.ndim(value) else value for name, value in values.items()})


def _grid(shape: Shape, job: Job, cluster: Cluster, fixed: dict[str, int]) -> dict[str, Num]:
    """Candidates as columns: the coarse axes are tried one by one, the fine ones are multiplied out."""
    gpus, experts = cluster.gpus, shape.experts
    tps = [
        tp for tp in POWERS
        if tp <= min(64, cluster.nvlink_domain) and not (shape.num_heads % tp or shape.num_kv_heads % tp or shape.ffn % tp)
    ]  # fmt: skip
    cps = [cp for cp in POWERS if cp == 1 or (job.seq // cp >= 2048 and job.seq % (2 * cp) == 0)]
    pps = [pp for pp in range(1, min(shape.num_layers, 64) + 1) if gpus % pp == 0]
    eps = [ep for ep in POWERS if experts and experts.num_experts % ep == 0] or [1]
    rows: list[tuple[int, ...]] = []
    for tp, cp, pp in product(tps, cps, pps):
        replicas, rest = divmod(gpus, tp * cp * pp)
        if rest or not replicas or job.global_batch % replicas:
            continue
        local = job.global_batch // replicas
        batches = [size for size in POWERS[:7] if local % size == 0 and (pp == 1 or local // size >= pp)]
        kinds = [0] if replicas == 1 else [0, 1, 2, 3] + [4] * (replicas > cluster.nvlink_domain // (tp * cp) > 1)
        turns = [(1, 0)] if pp == 1 else [(1, 0), (1, 2), (2, 3)] + [
            (vp, 1) for vp in (2, 3, 4, 5, 6, 8, 12, 16) if vp * pp <= shape.num_layers
        ]  # fmt: skip
        for (vp, schedule), ep, kind, size, again in product(turns, eps, kinds, batches, (0, 1, 2)):
            if schedule == 1 and (local // size) % pp:
                continue
            if schedule >= 2 and kind in (3, 4):  # weights that are dealt out go with whole backward passes
                continue
            if ep > replicas * cp * tp:
                continue
            for sp in (0, 1) if tp > 1 and not experts else (int(tp > 1),):
                rows.append((tp, sp, cp, 0, pp, vp, schedule, ep, kind, size, again))
                if cp > 1:
                    rows.append((tp, sp, cp, 1, pp, vp, schedule, ep, kind, size, again))
    table = np.array(rows, dtype=np.int64).reshape(-1, len(AXES))
    for axis, value in fixed.items():
        table = table[table[:, AXES.index(axis)] == value]
    return {axis: table[:, index] for index, axis in enumerate(AXES)}


def _cut(columns: dict[str, Num], job: Job, cluster: Cluster) -> Cut:
    tp, cp, pp, kind = (columns[name] for name in ("tp", "cp", "pp", "kind"))
    replicas = cluster.gpus // (tp * cp * pp)
    node = np.gcd(replicas, np.maximum(1, cluster.nvlink_domain // (tp * cp)))
    fsdp = np.where(kind == 0, 1, np.where(kind == 4, node, replicas))
    bubbles = np.array([BUBBLE.get(name, 1.0) for name in SCHEDULES])
    return Cut(
        dp=replicas // fsdp, fsdp=fsdp, zero=np.where(fsdp > 1, np.array([0, 1, 2, 3, 3])[kind], 0), tp=tp,
        sp=columns["sp"], cp=cp, gathers=columns["gathers"], pp=pp, vp=columns["vp"], ep=columns["ep"], etp=1 + 0 * tp,
        micro_batch=columns["micro_batch"], full=(columns["recompute"] == 2) * 1.0,
        selective=(columns["recompute"] == 1) * 1.0, chunked=0.0, item=2, fp8=float(job.matmul == "fp8"),
        bubble=bubbles[columns["schedule"]],
    )  # fmt: skip
