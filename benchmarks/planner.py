"""Claim: the time and memory that `weft plan` predicts are those that others measured.

    python benchmarks/planner.py ../shared/data/published-runs.jsonl.gz --json benchmarks/results/planner.json
    python benchmarks/planner.py benchmarks/rows/torchtitan.jsonl

Every run is predicted from its shape, layout, cluster and job alone, with constants that are frozen in
plan/constants.py. For each set of runs:

    MAPE, bias     mean of |predicted/measured - 1|, and of predicted/measured - 1, of the step time
    null           MAPE of one median TFLOP/s for each GPU and precision of the same set, recomputation credited: a model
                   that knows the answers and nothing else. `skill` is 1 - MAPE/null
    inside         share of runs within what is told beside a prediction as ±
    memory         MAPE of the peak that rank 0's allocator saw
    false fits     runs that ran out of memory and were said to fit; false no: runs that ran and were said not to
    Spearman       of the order of layouts, mean over cells of one model on as many GPUs, of 5 layouts or more
    regret         how much slower than the best of its cell the layout is that the plan would pick: median
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from published import Run, read_rows, read_run
from weft.plan.footprint import footprint
from weft.plan.time import step_time
from weft.plan.work import stack

HELD_OUT = (
    "megatron-bridge", "fms-fsdp", "jax-toolbox-pax", "mt-nlg", "mcore-h100-weak", "deepspeed-azure", "megatron-2021-01",
    "torchtitan", "megascale-megatron", "nt4-340b", "bloom", "llama3-405b", "vtrain-multi",
)  # fmt: skip
"""Sets of which no row was looked at when the constants were fitted; of the others every second row was not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs, left_out = read(args.rows)
    report = score(runs) | {"left out": left_out}
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False, default=int) + "\n", encoding="utf-8")


def read(path: Path) -> tuple[list[Run], dict[str, int]]:
    """The runs, and why others are none."""
    runs: list[Run] = []
    reasons: Counter[str] = Counter()
    for row in read_rows(path):
        try:
            runs.append(read_run(row))
        except KeyError as error:
            reasons[f"{error} is not told"] += 1
        except ValueError as error:
            reasons[str(error).splitlines()[0][:80] if "validation error" not in str(error) else "no weft layout"] += 1
    return runs, dict(reasons.most_common())


@dataclass(frozen=True)
class Predicted:
    """A row for each run: seconds of a step, bytes that rank 0's allocator reports, how near both are said to be, whether
    the fullest GPU holds it."""

    seconds: np.ndarray
    within: np.ndarray
    bytes: np.ndarray
    memory_within: np.ndarray
    fits: np.ndarray

    def rows(self, ids: list[int]) -> Predicted:
        return Predicted(*(getattr(self, field.name)[ids] for field in fields(self)))


def predict(runs: list[Run]) -> Predicted:
    work = stack([run.work for run in runs])
    held, first = footprint(work), footprint(work, first=True)
    time, fits = step_time(work), held.fits(work.machine)
    return Predicted(*map(np.asarray, (time.total, time.spread, first.allocated, first.spread, fits)))


def fitted_on(run: Run) -> bool:
    """Whether the constants were fitted with this run: every second one of the sets that are not held out."""
    return run.set not in HELD_OUT and int.from_bytes(run.name.encode()[-4:]) % 2 == 0


def stalls(run: Run) -> bool:
    """Runs of the one set whose pipelines wait 0.1 to 1.5 s in each micro-batch, whatever its size: docs/plan.md."""
    return run.set == "nanotron-ultrascale" and run.layout.pp > 1


def score(runs: list[Run]) -> dict[str, Any]:
    predicted = predict(runs)
    sets = defaultdict(list)
    for index, run in enumerate(runs):
        sets[run.set].append(index)
    groups = {
        "all": list(range(len(runs))),
        "unseen": [i for i, run in enumerate(runs) if not fitted_on(run)],
        "unseen, 100 GPUs or more": [i for i, run in enumerate(runs) if not fitted_on(run) and run.layout.world >= 100],
        "held-out sets, 100 GPUs or more": [
            i for i, run in enumerate(runs) if run.set in HELD_OUT and run.layout.world >= 100
        ],
        "unseen, without stalling pipelines": [
            i for i, run in enumerate(runs) if not fitted_on(run) and not stalls(run)
        ],
        "unseen, without nanotron, 100 GPUs or more": [
            i
            for i, run in enumerate(runs)
            if not fitted_on(run) and run.set != "nanotron-ultrascale" and run.layout.world >= 100
        ],
        "without stalling pipelines, 100 GPUs or more": [
            i for i, run in enumerate(runs) if not fitted_on(run) and not stalls(run) and run.layout.world >= 100
        ],
    }

    def of(ids: list[int]) -> dict[str, Any]:
        return figures([runs[i] for i in ids], predicted.rows(ids))

    return {
        "sets": {name: of(ids) for name, ids in sets.items()},
        "together": {name: of(ids) for name, ids in groups.items() if ids},
        "split": f"held out: {', '.join(HELD_OUT)}; of the others every second row",
    }  # fmt: skip


def figures(runs: list[Run], predicted: Predicted) -> dict[str, Any]:
    seconds, memory, fits = predicted.seconds, predicted.bytes, predicted.fits
    timed = [i for i, run in enumerate(runs) if run.seconds and not run.duplicate]
    ratio = np.array([seconds[i] / runs[i].seconds for i in timed])
    found: dict[str, Any] = {"rows": len(runs), "timed": len(timed)}
    if timed:
        null = np.array(null_model([runs[i] for i in timed]))
        found |= {
            "MAPE": pct(np.abs(ratio - 1).mean()),
            "bias": pct((ratio - 1).mean()),
            "null": pct(np.abs(null - 1).mean()),
        }
        within = np.exp(np.abs(np.log(ratio))) <= 1 + predicted.within[timed]
        found["inside"] = pct(within.mean())
        if np.abs(null - 1).mean() > 0:  # a set of one run is its own median
            found["skill"] = round(float(1 - np.abs(ratio - 1).mean() / np.abs(null - 1).mean()), 2)
    weighed = [i for i, run in enumerate(runs) if run.memory]
    if weighed:
        off = np.array([memory[i] / runs[i].memory for i in weighed])
        found |= {
            "memory MAPE": pct(np.abs(off - 1).mean()),
            "memory bias": pct((off - 1).mean()),
            "memory inside": pct((np.abs(off - 1) <= predicted.memory_within[weighed]).mean()),
            "weighed": len(weighed),
        }
    oom = [fit for fit, run in zip(fits, runs, strict=True) if run.status.startswith("oom")]
    ran = [fit for fit, run in zip(fits, runs, strict=True) if run.seconds]
    found |= {"OOM": len(oom), "false fits": sum(oom), "false no": len(ran) - sum(ran)}
    crashed = [i for i, run in enumerate(runs) if run.status and not run.status.startswith("oom")]
    found["crashed but under half full"] = sum(bool(memory[i] < runs[i].cluster.memory / 2) for i in crashed)
    cells = defaultdict(list)
    for i in timed:
        run = runs[i]
        cells[run.set, run.gpu, run.model, run.shape.num_layers, run.layout.world, run.job].append(i)
    full = [ids for ids in cells.values() if len({str(runs[i].layout) for i in ids}) >= 5]
    if full:
        orders = [spearman([seconds[i] for i in ids], [runs[i].seconds or 0 for i in ids]) for ids in full]
        regrets = []
        for ids in full:
            pick = min(ids, key=lambda i: seconds[i])
            regrets.append((runs[pick].seconds or 0) / min(runs[i].seconds or 0 for i in ids) - 1)
        found |= {
            "cells": len(full),
            "Spearman": round(fmean(orders), 3),
            "regret": pct(median(regrets)),
            "worst regret": pct(max(regrets)),
        }
    return found


def null_model(runs: list[Run]) -> list[float]:
    """Predicted over measured, if all runs of a GPU and precision had the median TFLOP/s of them."""
    rates = [hardware_flops(run) / (run.seconds or 1) for run in runs]
    kinds = defaultdict(list)
    for run, rate in zip(runs, rates, strict=True):
        kinds[run.gpu, run.job.matmul].append(rate)
    return [rate / median(kinds[run.gpu, run.job.matmul]) for run, rate in zip(runs, rates, strict=True)]


def hardware_flops(run: Run) -> float:
    """Of one GPU in a step, with what full recomputation adds."""
    again = 4 / 3 if run.layout.recompute == "full" else 1
    flops = run.shape.flops_per_token(run.job.seq, causal=False) * run.job.seq * run.job.global_batch
    return again * flops / run.layout.world


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def pct(value: float) -> float:
    return round(100 * float(value), 2)


def show(report: dict[str, Any]) -> None:
    names = (
        "timed",
        "MAPE",
        "bias",
        "null",
        "skill",
        "inside",
        "memory MAPE",
        "memory bias",
        "false fits",
        "false no",
        "cells",
        "Spearman",
        "regret",
    )
    print(f"{'':46}" + "".join(f"{name:>13}" for name in names))
    for name, row in [*report["sets"].items(), *report["together"].items()]:
        print(f"{name:46}" + "".join(f"{row.get(key, ''):>13}" for key in names))
    print("left out:", ", ".join(f"{count} {reason}" for reason, count in report["left out"].items()))


if __name__ == "__main__":
    main()
