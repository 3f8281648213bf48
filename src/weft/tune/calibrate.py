"""Calibrate: measure the machine that this runs on, in as many processes as will train on it, and write a cluster file."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from weft.launch.cores import num_cores
from weft.launch.process import Process, start_process, stop_process
from weft.plan.machine import Cluster
from weft.plan.show.text import write_cluster
from weft.plan.time.curves import Curves, Grid
from weft.train.hardware import peak_flops
from weft.tune.clock import Clock, quiet
from weft.tune.measure import FULL, QUICK, Point, Sizes, points
from weft.tune.messages import Messages

PASSES = {"full": 3, "quick": 1}
"""Times that every point is visited: who is in the way now has gone by then, or so we hope."""


def main(arguments: list[str]) -> int:
    """Entry of a process that `weft plan calibrate` started: device, quick or full, and the file to write."""
    device, effort, out = arguments
    process = start_process(device)
    try:
        cluster = calibrate(process, effort)
        if process.is_main:
            write_cluster(cluster, Path(out))
    finally:
        stop_process()
    return 0


def calibrate(process: Process, effort: str) -> Cluster:
    """Everything that is to be known of this machine. Called by all processes at once; each gets the same."""
    device = process.device
    sizes = {"full": FULL, "quick": QUICK}[effort][device.type]
    clock, messages = Clock(device), Messages(device)
    work = [*points(sizes, device), *messages.points(sizes)]
    times = measure(work, clock, PASSES[effort], shown=process.is_main)
    unit, beside = messages.unit(clock), messages.beside(clock)
    grids = agree(times, work)
    unit, beside = _mean([unit, beside])
    curves = Curves(
        processes=process.world, threads=torch.get_num_threads(), device=device.type, unit=unit, beside=beside,
        grids=grids,
    )  # fmt: skip
    return cluster_of(curves, sizes, process)


# -- the curves -------------------------------------------------------------------------------------------------------

Times = dict[str, dict[tuple[int, ...], list[float]]]
"""Curve → place → times."""


def measure(work: list[Point], clock: Clock, passes: int, *, shown: bool) -> Times:
    """Times of every place of every curve. Products too large to be measured are told from smaller ones."""
    times: Times = {name: {} for point in work for name in point.names}
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(shown))
        task = bar.add_task("measuring", total=passes * len(work), what="")
        for turn in range(passes):
            for point in work:
                bar.update(task, advance=1, what=f"{point.names[0]} {'×'.join(map(str, point.place))}")
                known = times[point.names[0]]
                if turn and point.place not in known:
                    continue
                if point.flops and too_long(point, known, clock):
                    continue
                for name, found in point.measure(clock).items():
                    times[name].setdefault(point.place, []).extend(found)
    for point in work:
        if point.place not in times[point.names[0]]:
            less = smaller(point, times[point.names[0]])
            scale = point.flops / (2.0 * less[0] * less[1] * less[2])
            times[point.names[0]][point.place] = [scale * quiet(times[point.names[0]][less])]
    return times


def too_long(point: Point, known: dict[tuple[int, ...], list[float]], clock: Clock) -> bool:
    """Whether a product takes more than a repetition may, as a smaller one tells; all processes say the same."""
    if point.place in known:
        return False
    guess = 0.0
    if known:
        less = smaller(point, known)
        guess = point.flops / (2.0 * less[0] * less[1] * less[2]) * quiet(known[less])
    if dist.get_world_size() > 1:
        longest = torch.tensor(guess, dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        guess = float(longest)
    return guess > clock.longest


def smaller(point: Point, known: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the measured places, the nearest below this one, else the largest."""
    below = [place for place in known if all(a <= b for a, b in zip(place, point.place, strict=True))]
    return max(below or list(known), key=lambda place: (place[0] * place[1] * place[2], place))


def agree(times: Times, work: list[Point]) -> dict[str, Grid]:
    """The same curves for all processes: of each place the mean over them of what it takes when nobody disturbs. Of
    messages it is the median, for they wait as often as they do."""
    axes = {name: point.axes for point in work for name in point.names}
    shared = {name for point in work for name in point.names if point.shared}
    found = {}
    for name, places in times.items():
        middle = statistics.median if name in shared else quiet
        seconds = _mean([middle(places[place]) for place in sorted(places)])
        found[name] = Grid(
            axes=tuple(tuple(map(float, axis)) for axis in axes[name]),
            seconds=tuple(float(f"{s:.4g}") for s in seconds),
        )
    return found


def _mean(values: list[float]) -> list[float]:
    """Over all processes."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return [float(f"{value:.4g}") for value in (total / dist.get_world_size()).tolist()]


# -- the cluster ------------------------------------------------------------------------------------------------------


def cluster_of(curves: Curves, sizes: Sizes, process: Process) -> Cluster:
    """What a search over all layouts works with: the best rates of the curves."""
    best = curves.peak
    peak = best if process.device.type == "cpu" else max(best, peak_flops(process.device, "bf16").flops)
    numbers = sizes.numbers[-1]
    memory = 12 * numbers / curves.compute("add_fp32", numbers)
    length, width = sizes.lengths[-1], sizes.head_dims[-1]
    attention = 2.0 * length**2 * width / curves.compute("attention_forward_bf16", length, width)
    size = sizes.bytes[-1]
    ways = process.world
    bus = (ways - 1) / ways * size / curves.message("all_gather_fp32", ways, size) if ways > 1 else memory
    return Cluster(
        title=f"{_name(process.device)}, {ways} processes, measured {time.strftime('%Y-%m-%d')}",
        gpus=ways, peak_tflops=_digits(peak / 1e12), peak_8bit_tflops=_digits(peak / 1e12),
        gemm_efficiency=_digits(min(1.0, best / peak)), gemm_8bit_efficiency=_digits(min(1.0, best / peak)),
        attention_efficiency=_digits(min(1.0, attention / peak)), sms=_sms(process.device),
        memory_gib=_digits(_memory(process) / 2**30), memory_gb_per_s=_digits(memory / 1e9),
        nvlink_gb_per_s=_digits(bus / 1e9), nvlink_domain=ways, network_gb_per_s=_digits(bus / 1e9), per_node=ways,
        generation=0, device=curves.device, host_memory_gib=0 if curves.device == "cpu" else 256, curves=curves,
    )  # fmt: skip


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU of {num_cores()} cores"


def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _memory(process: Process) -> float:
    """Bytes of one process: a GPU's, or its part of the machine's."""
    if process.device.type == "cuda":
        return float(torch.cuda.get_device_properties(process.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / process.world


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[what]}"))
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not shown or not console.is_terminal, transient=True)
