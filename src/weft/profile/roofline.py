"""Roofline: what the largest operations reach of what the device could do with them (Williams et al., 2009). Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weft.plan.machine import cluster_names, read_cluster
from weft.profile.attribution import ITEM_BYTES, Attribution, numel
from weft.profile.breakdown import Breakdown, within
from weft.profile.load import Profile
from weft.profile.names import WORK, op_kind
from weft.profile.trace import Event


@dataclass(frozen=True)
class Device:
    """FLOP/s and bytes/s at most, and whose numbers these are."""

    name: str
    flops: float
    bytes: float
    source: str


@dataclass(frozen=True)
class Operation:
    """All runs of one operation on tensors of one size, in a step.

    Attributes:
        seconds, count: of a step on average.
        flops, bytes: of one run, as its tensors' sizes say: read once and written once. 0: not counted.
    """

    name: str
    kind: str
    dims: str
    count: float
    seconds: float
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def rate(self) -> float:
        """FLOP/s."""
        return self.flops * self.count / self.seconds

    def reached(self, device: Device) -> float:
        """Of what is possible: the share of the roof above it, which is memory's or arithmetic's."""
        if not self.flops:
            return self.bytes * self.count / self.seconds / device.bytes
        return self.rate() / min(device.flops, self.intensity * device.bytes)

    def bound(self, device: Device) -> str:
        return "compute" if self.flops and self.intensity * device.bytes >= device.flops else "memory"


def device_of(profile: Profile) -> Device | None:
    """From the capture; of other traces from the GPU's name, where there is a cluster preset of it."""
    about = profile.about
    if about.get("peak_flops") and about.get("bytes_per_s"):
        return Device(about["device"], about["peak_flops"], about["bytes_per_s"], about.get("peak_source", ""))
    name = next((str(it.get("name", "")) for it in profile.ranks[0].trace.devices), "")
    for preset in sorted(cluster_names(), key=len, reverse=True):
        words = preset.upper().split("-")  # h100-96gb is an H100, and not the one of 80 GB
        if all(word in name.upper() for word in words) and "CPU" not in words[0]:
            cluster = read_cluster(preset)
            return Device(name, cluster.peak_tflops * 1e12, cluster.memory_gb_per_s * 1e9, f"datasheet, {preset}")
    return None


def operations(breakdown: Breakdown, most: int = 12) -> list[Operation]:
    """Those that take most of a step, by name and sizes."""
    found: dict[tuple[str, str], list[tuple[Event, float]]] = defaultdict(list)
    attribution = breakdown.attribution
    for step in breakdown.steps:
        for event, seconds in _runs(attribution, step.start, step.stop):
            found[event.name, dims_of(event)].append((event, seconds))
    count = max(1, len(breakdown.steps))
    result = []
    for (name, dims), runs in found.items():
        event = runs[0][0]
        result.append(
            Operation(
                name.removeprefix("aten::"),
                op_kind(name) or "element-wise",
                dims,
                len({id(it) for it, _ in runs}) / count,
                max(sum(seconds for _, seconds in runs) / count, 1e-12),
                flops(event),
                moved(event),
            )
        )
    return sorted(result, key=lambda it: -it.seconds)[:most]


def _runs(attribution: Attribution, start: float, stop: float) -> Iterator[tuple[Event, float]]:
    """Operations that work, each with its seconds on the device: of its kernels, or on a CPU its own."""
    trace = attribution.trace
    if trace.on_gpu:
        for kernel in within(trace.kernels, start, stop):
            launch = trace.launches.get(kernel.args.get("correlation"))
            if launch is not None and not kernel.mark.waits and (op := _operation(launch)):
                yield op, kernel.stop - kernel.start
        return
    for event in within(trace.threads.get(attribution.main, []), start, stop):
        if _works(event) and (event.parent is None or not _works(event.parent)):
            yield event, event.stop - event.start


def _operation(launch: Event) -> Event | None:
    return next((it for it in launch.ancestors() if it.cat == "cpu_op" and _works(it)), None)


WRAPPERS = {"aten::linear", "aten::matmul", "aten::scaled_dot_product_attention"}
"""They have others do the work, which are counted."""


def _works(event: Event) -> bool:
    return (
        event.cat == "cpu_op"
        and event.name.startswith(("aten::", "weft::"))
        and (op_kind(event.name) in WORK and event.name not in WRAPPERS and bool(event.args.get("Input Dims")))
    )


def dims_of(event: Event) -> str:
    """16×64×256 · 256×704: of its first tensors."""
    shapes = [dims for dims in event.args.get("Input Dims", []) if dims and isinstance(dims[0], int)]
    return " · ".join("×".join(map(str, dims)) for dims in shapes[:3])


def flops(event: Event) -> float:
    """Of matrix products and attention; 0 of all else."""
    dims: list[Any] = [it for it in event.args.get("Input Dims", []) if it]
    name = event.name.partition("::")[2].rstrip("_")
    try:
        if name in ("mm", "_scaled_mm", "_int_mm", "bmm"):
            return 2.0 * numel(dims[0]) * dims[1][-1]
        if name in ("addmm", "baddbmm"):
            return 2.0 * numel(dims[1]) * dims[2][-1]
        if name == "mkldnn_linear":
            return 2.0 * numel(dims[0]) * dims[1][0]
        if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
            q, k, v = dims[1:4] if "backward" in name else dims[:3]
            masked = 0.5 if "True" in event.args.get("Concrete Inputs", []) else 1.0
            scores = 2.0 * numel(q[:-1]) * k[-2] * (q[-1] + v[-1])  # [B, H, T, E]
            return masked * scores * (2.5 if "backward" in name else 1.0)
    except (IndexError, TypeError, ValueError):  # of another order than torch has now
        return 0.0
    return 0.0


def moved(event: Event) -> float:
    """Bytes of its inputs, and of what it gives, which is taken to be as large as the largest; of products it is known."""
    dims, types = event.args.get("Input Dims", []), event.args.get("Input type", [])
    sizes = [numel(shape) * ITEM_BYTES.get(kind, 4) for shape, kind in zip(dims, types, strict=False) if shape]
    if not sizes:
        return 0.0
    name = event.name.partition("::")[2]
    shapes = [shape for shape in dims if shape and isinstance(shape[0], int)]
    factors = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3}.get(name, 0)  # what comes after is where it goes
    if 0 < factors <= len(shapes):
        left, right = shapes[factors - 2 : factors]
        return sum(sizes[:factors]) + numel(left[:-1]) * right[-1] * ITEM_BYTES.get(types[0], 4)
    return float(sum(sizes)) if name.endswith("_") else float(sum(sizes) + max(sizes))
