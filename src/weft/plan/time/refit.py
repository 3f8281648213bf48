"""Refit: what runs have taken, against what the curves say: two numbers, for computation and for messages. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.config.load import load_config
from weft.config.tree import Config
from weft.plan.machine import Cluster
from weft.plan.memory.moments import settled
from weft.plan.numbers import Job
from weft.plan.time.counted import counted_time
from weft.plan.time.curves import Curves

WARM_UP = 2
"""Steps at the start of a run that allocate and connect, and so say nothing of others."""
NEAR = 3.0
"""A scale is within this and its inverse: more is another machine."""


@dataclass(frozen=True)
class Ran:
    """A run that has ended: its settings, and of its steps the median.

    Attributes:
        seconds: without waits for data.
        busiest_expert: what it was given, in even shares; 1 where there are no experts.
    """

    name: str
    config: Config
    seconds: float
    busiest_expert: float = 1.0


@dataclass(frozen=True)
class Fit:
    cluster: Cluster
    runs: tuple[tuple[Ran, float, float], ...]  # with what was predicted before and after

    def lines(self) -> Iterator[str]:
        """What was found, for the terminal."""
        for ran, before, after in self.runs:
            yield (
                f"{ran.name}  {ran.config.layout}  measured {ran.seconds:.4g} s, predicted {before:.4g} "
                f"({before / ran.seconds - 1:+.1%}), now {after:.4g} ({after / ran.seconds - 1:+.1%})"
            )
        curves = self.cluster.curves
        assert curves is not None
        scales = {"compute_scale": curves.compute_scale, "message_scale": curves.message_scale}
        yield ", ".join(f"{name} {scale:.4g}" for name, scale in scales.items())
        for name, scale in scales.items():
            if scale in (NEAR, 1 / NEAR):
                yield (
                    f"{name} is at its bound: these runs and the curves are of two machines, or one had other work beside "
                    "them; measure again, with nothing else at work"
                )


def read_runs(folders: Sequence[Path]) -> list[Ran]:
    """Raises: ValueError: a folder holds no run, or one of too few steps."""
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Ran:
    config, log = load_config([folder / "config.toml"]), folder / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"there is no log {log}: is {folder} the folder of a run?")
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    times = [step["seconds"] - step["data_wait"] - step["checkpoint_wait"] for step in steps if step["step"] > WARM_UP]
    if len(times) < 3:
        raise ValueError(
            f"{log} has {len(times)} steps after the first {WARM_UP}, too few to tell a step's time: run more, or "
            "have more of them logged with --set log.every=1"
        )
    busiest = [step["busiest_expert"] for step in steps if step.get("busiest_expert") is not None]
    return Ran(str(folder), config, statistics.median(times), statistics.median(busiest or [1.0]))


def refit(cluster: Cluster, runs: Sequence[Ran]) -> Fit:
    """The cluster with scales that make the error over these runs least. With one run, or runs of one kind, messages and
    computation cannot be told apart: then both get the same.

    Raises:
        ValueError: the cluster has no curves, or a run was on other processes than the cluster's.
    """
    curves = cluster.curves
    if curves is None:
        raise ValueError("the cluster file has no curves to fit: make it with `weft plan calibrate` first")
    for ran in runs:
        if ran.config.layout.world > curves.processes:
            raise ValueError(
                f"{ran.name} ran on {ran.config.layout.world} processes, and the curves are of {curves.processes}: "
                "calibrate with as many"
            )
    scales = _scales(curves, runs)
    fitted = cluster.model_copy(update={"curves": _scaled(curves, *scales)})
    assert fitted.curves is not None
    return Fit(fitted, tuple((ran, predicted(ran, curves), predicted(ran, fitted.curves)) for ran in runs))


def _scales(curves: Curves, runs: Sequence[Ran]) -> tuple[float, float]:
    """By least squares of the relative error: a step is about linear in both."""
    plain = _scaled(curves, 1.0, 1.0)
    rows = []
    for ran in runs:
        total = predicted(ran, plain)
        messages = predicted(ran, _scaled(curves, 1.0, 2.0)) - total  # what doubling messages adds
        rows.append(((total - messages) / ran.seconds, messages / ran.seconds))
    matrix = np.array(rows)
    shares = matrix[:, 1] / matrix.sum(axis=1)
    if shares.max() - shares.min() < 0.02:
        both = float(1 / matrix.sum(axis=1).mean())
        scales = [both, both]
    else:
        scales = list(map(float, np.linalg.lstsq(matrix, np.ones(len(runs)), rcond=None)[0]))
        for held, other in ((1, 0), (0, 1)):
            if scales[held] != _near(scales[held]):  # the other is then the best beside its bound
                rest, of = 1 - _near(scales[held]) * matrix[:, held], matrix[:, other]
                scales[other] = float(rest @ of / (of @ of))
    compute, message = map(_near, scales)
    return compute, message


def _near(scale: float) -> float:
    return float(np.clip(scale, 1 / NEAR, NEAR))


def _scaled(curves: Curves, compute: float, message: float) -> Curves:
    return curves.model_copy(update={"compute_scale": compute, "message_scale": message})


def predicted(ran: Ran, curves: Curves) -> float:
    """Seconds of a step."""
    config = ran.config
    job = Job(seq=config.seq, global_batch=config.train.global_batch, busiest_expert=ran.busiest_expert)
    return float(counted_time(config.model, settled(config, curves.device), job, curves).total)
