"""Claim: how near a plan is depends on the kind of run; docs/accuracy.md says how near for which.

    python benchmarks/planner_kinds.py ../shared/data/published-runs.jsonl.gz

Of all published runs that no constant was fitted to, those of the file and those in benchmarks/rows:

    half, nine in ten  within how much half of the runs are, and nine in ten of them: |predicted / measured - 1| of the time
    bias               median of predicted / measured - 1: negative, plans are too fast
    inside             share of the runs within what a plan tells beside its number as ±
    memory             within how much half of the peaks are that were measured, nine in ten, and how many those are
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import planner
from common import ROOT, shown, write
from published import Run

SWEEP = "nanotron-ultrascale"
"""Every layout of small models, run by two versions of one program: it has a line of its own and counts in no other."""


def dense(run: Run) -> bool:
    return run.shape.experts is None


def coarse(run: Run) -> bool:
    """Whether products are of 8 bits or fewer."""
    return run.job.matmul == "fp8"


def large(run: Run) -> bool:
    return run.layout.world >= 100


KINDS: dict[str, Callable[[Run], bool]] = {
    "all": lambda run: True,
    "dense, 16 bits, 100 GPUs or more": lambda run: dense(run) and not coarse(run) and large(run),
    "dense, 16 bits, fewer": lambda run: dense(run) and not coarse(run) and not large(run),
    "dense, 8 bits and fewer": lambda run: dense(run) and coarse(run),
    "mixtures, 100 GPUs or more": lambda run: not dense(run) and large(run),
    "mixtures, fewer": lambda run: not dense(run) and not large(run),
    "pipelines": lambda run: run.layout.pp > 1,
    "weights sharded (ZeRO-3, FSDP)": lambda run: run.layout.fsdp > 1 and run.layout.zero == 3,
    "sequences of 16,384 tokens and more": lambda run: run.job.seq >= 16384,
    "V100": lambda run: run.gpu.startswith("V100"),
    "A100": lambda run: run.gpu.startswith("A100"),
    "H100, H200, GH200": lambda run: run.cluster.generation == 2,
    "B200, B300, GB200, GB300": lambda run: run.cluster.generation == 3,
    "MI250X, MI300X": lambda run: run.cluster.generation == 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the file that constants were fitted with")
    args = parser.parse_args()
    files = (args.rows, *sorted((ROOT / "benchmarks" / "rows").glob("*.jsonl")))
    runs = [run for file in files for run in planner.read(file)[0] if not planner.fitted_on(run) and not run.duplicate]
    predicted = planner.predict(runs)

    def of(belongs: Callable[[Run], bool], *, sweep: bool = False) -> dict[str, Any]:
        ids = [i for i, run in enumerate(runs) if belongs(run) and (run.set == SWEEP) == sweep]
        return near([runs[i] for i in ids], predicted.rows(ids))

    found = {kind: of(belongs) for kind, belongs in KINDS.items()}
    found[f"the sweep {SWEEP}"] = of(lambda run: True, sweep=True)
    for kind, figures in found.items():
        print(f"{kind:38}", ", ".join(f"{name} {figure}" for name, figure in figures.items()))
    print("written:", shown(write("planner_kinds", {"kinds": found}, ("numpy",))))


def near(runs: list[Run], predicted: planner.Predicted) -> dict[str, Any]:
    """How near the predictions of these runs are, in per cent."""
    timed = [i for i, run in enumerate(runs) if run.seconds]
    weighed = [i for i, run in enumerate(runs) if run.memory]
    time = np.array([predicted.seconds[i] / (runs[i].seconds or 0) for i in timed])
    memory = np.array([predicted.bytes[i] / (runs[i].memory or 0) for i in weighed])
    inside = np.exp(np.abs(np.log(time))) <= 1 + predicted.within[timed]
    found: dict[str, Any] = {"runs": len(timed), "sets": len({runs[i].set for i in timed}), **quantiles(time)}
    found |= {"bias": planner.pct(np.median(time) - 1), "inside": planner.pct(inside.mean())}
    return found | ({"memory": {"runs": len(weighed), **quantiles(memory)}} if weighed else {})


def quantiles(ratio: np.ndarray) -> dict[str, float]:
    half, most = np.quantile(np.abs(ratio - 1), [0.5, 0.9])
    return {"half": planner.pct(half), "nine in ten": planner.pct(most)}


if __name__ == "__main__":
    main()
