"""How near could any plan come to the largest set of published runs? A model that is taught the answers of one half.

    python benchmarks/planner_limit.py ../shared/data/published-runs.jsonl.gz

The Ultra-Scale Playbook's runs are most of the file's, and one program's; `told` is all that a row says of one: the model's
size, GPUs, each axis of the cut, micro-batch, accumulation, ZeRO's stage, what is predicted of time and memory. Trees that
are boosted by gradients (scikit-learn's; least absolute error) are taught by how much each run of the half that constants
were fitted to is off, and correct the other half by it. What error is left to them is not a matter of constants, nor of
anything that a row says and a formula could.

    plan      mean of |predicted / measured - 1| of the other half
    taught    the same after the correction, the mean of so many models of different seeds
    file      of all rows of the file that were not fitted to: the plan's, and with these runs corrected
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

import planner
from common import shown, write
from planner_kinds import SWEEP
from published import Run

SEEDS = range(5)
LARGE = 100
"""GPUs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    runs = [run for run in planner.read(args.rows)[0] if not run.duplicate]
    predicted = planner.predict(runs)
    found = {}
    for what, least in (("time", LARGE), ("time", 0), ("memory", 0)):
        measured = np.array([(run.seconds if what == "time" else run.memory) or np.nan for run in runs])
        plan = predicted.seconds if what == "time" else predicted.bytes
        counts = ~np.isnan(measured) & np.array([run.layout.world >= least for run in runs])
        name = f"{what}, {least} GPUs or more" if least else what
        found[name] = limit(runs, predicted, plan, measured, counts)
        print(f"{name:24}", ", ".join(f"{key} {value}" for key, value in found[name].items()))
    print("written:", shown(write("planner_limit", {"limits": found}, ("numpy", "scikit-learn"))))


def limit(
    runs: list[Run], predicted: planner.Predicted, plan: np.ndarray, measured: np.ndarray, counts: np.ndarray
) -> dict[str, float]:
    """In per cent."""
    sweep = counts & np.array([run.set == SWEEP for run in runs])
    fitted = np.array([planner.fitted_on(run) for run in runs])
    rows = np.array([told(run, *pair) for run, *pair in zip(runs, predicted.seconds, predicted.bytes, strict=True)])
    lesson, exam, rest = sweep & fitted, sweep & ~fitted, counts & ~fitted & ~sweep
    off = np.log(measured / plan)
    corrections = [trees(seed).fit(rows[lesson], off[lesson]).predict(rows[exam]) for seed in SEEDS]
    before = np.abs(plan / measured - 1)
    after = np.mean([np.abs(np.exp(found - off[exam]) - 1) for found in corrections], axis=0)
    return {
        "taught by": int(lesson.sum()), "runs": int(exam.sum()), "plan": planner.pct(before[exam].mean()),
        "taught": planner.pct(after.mean()), "file": planner.pct(before[exam | rest].mean()),
        "file, taught": planner.pct(np.concatenate([after, before[rest]]).mean()),
    }  # fmt: skip


def trees(seed: int) -> HistGradientBoostingRegressor:
    return HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=150,
        learning_rate=0.06,
        max_leaf_nodes=12,
        min_samples_leaf=5,
        random_state=seed,
    )


def told(run: Run, seconds: float, held: float) -> list[float]:
    """What a row says of a run, and what is predicted of it."""
    cut, batch = run.layout, run.job.global_batch
    sizes = (
        cut.world, cut.tp, cut.pp, cut.replicas, cut.micro_batch_size(batch), cut.num_micro_batches(batch), batch,
        run.shape.num_params, seconds, held,
    )  # fmt: skip
    return [*np.log2(sizes), cut.zero if cut.fsdp > 1 else 0]


if __name__ == "__main__":
    main()
