"""One layout of a model on a cluster, predicted. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.recompute import Recompute
from weft.models.shape import Shape
from weft.plan.machine import Cluster
from weft.plan.memory.footprint import Footprint, footprint
from weft.plan.memory.moments import settled
from weft.plan.numbers import WEFT, Job, in_8_bits, numbers
from weft.plan.time.counted import counted_time
from weft.plan.time.step import PARTS, Time, step_time
from weft.plan.work import Software


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
        """Raises: ValueError: the layout does not go with the model, the batch or the number of GPUs, nor a budget of
        memory with them, by what `weft train` counts."""
        if layout.world != cluster.gpus:
            raise ValueError(
                f"layout {layout} takes {layout.world:,} {cluster.units} and the cluster has {cluster.gpus:,}"
            )
        layout.check(shape, job.global_batch, job.seq)
        cut = counted_budget(shape, layout, job, cluster)
        work = numbers(shape, cut, job, cluster, software)
        time = plain(step_time(work))
        if cluster.curves and software is WEFT:  # which have no bus and no update on the CPU
            away = layout.offload_weights or layout.offload_optimizer
            counted = counted_time(shape, cut, job, cluster.curves)
            optimizer = time.optimizer if away else counted.optimizer
            time = replace(counted, optimizer=optimizer, offload=time.offload, mixed=time.mixed)
        return cls(shape, layout, job, cluster, software, time, plain(footprint(work)))

    @property
    def seconds(self) -> float:
        return float(self.time.total)

    @property
    def bytes(self) -> float:
        return float(self.memory.total)

    @property
    def fits(self) -> bool:
        return bool(self.memory.fits(self.cluster.machine()))

    @property
    def sure(self) -> bool:
        """It fits even if it takes as much more as such predictions are off (`spread`); else it fits tightly, if at all."""
        return bool(self.memory.sure(self.cluster.machine()))

    @property
    def verdict(self) -> str:
        return "fits" if self.sure else "fits tightly" if self.fits else "does not fit"

    @property
    def headroom(self) -> float:
        """Bytes of the GPU's memory that are left."""
        return self.cluster.memory - self.bytes

    @property
    def tokens_per_s(self) -> float:
        return self.job.seq * self.job.global_batch / self.seconds

    def mfu(self, *, causal: bool) -> float:
        """Share of the dense peak of the precision, in model FLOPs."""
        peak = self.cluster.peak(in_8_bits=in_8_bits(self.layout, self.job))
        flops = self.shape.flops_per_token(self.job.seq, causal=causal) * self.tokens_per_s
        return flops / (self.cluster.gpus * peak)

    @property
    def days(self) -> float:
        return self.job.tokens / self.tokens_per_s / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.cluster.gpus

    @property
    def bound(self) -> str:
        """What takes most beside the computation that any layout has; `compute` where nothing takes a tenth."""
        parts = {part: float(getattr(self.time, part)) for part in PARTS}
        extra = {name: parts[name] for name in WASTE}
        most = max(extra, key=lambda name: extra[name])
        if extra[most] > 0.1 * self.seconds:
            return WASTE[most]
        return "HBM" if parts["elementwise"] + parts["optimizer"] > parts["matmul"] else "compute"


def counted_budget(shape: Shape, layout: Layout, job: Job, cluster: Cluster) -> Layout:
    """With a budget of memory made as many blocks as `weft train` recomputes for it.

    Raises:
        ValueError: all of them are not enough.
    """
    if Recompute.parse(layout.recompute).budget is None:
        return layout
    train = {"global_batch": job.global_batch, "seq": job.seq}
    run = make_config({"model": shape.model_dump(), "layout": layout, "train": train})
    return settled(run, cluster.runs_on)


WASTE = {
    "recompute": "recompute", "launch": "launching kernels", "tp": "tp messages", "cp": "cp messages",
    "ep": "ep messages", "dp": "dp/fsdp messages", "pp": "pp messages", "bubble": "bubble", "offload": "offload",
}  # fmt: skip


Parts = TypeVar("Parts", Time, Footprint)


def plain(parts: Parts) -> Parts:
    """With plain numbers."""
    return type(parts)(*(float(getattr(parts, field.name)) for field in fields(parts)))
