"""Claim: the time and memory that `weft plan` predicts are those that others measured.

    python benchmarks/planner.py ../shared/data/published-runs.jsonl.gz --json benchmarks/results/planner.json
    python benchmarks/planner.py benchmarks/rows/torchtitan.jsonl

Every run is predicted from its shape, layout, cluster and job alone, with constants that are frozen in
plan/time/constants.py. For each set of runs:

    MAPE, bias     mean of |predicted/measured - 1|, and of predicted/measured - 1, of the step time
    null           MAPE of one median TFLOP/s for each GPU and precision, of the rows that constants were fitted to but
                   two sweeps over all layouts, recomputation credited. Where none of them has both: the GPU's in the
                   other precision, as much faster or slower as the peak is; a GPU that none of them has is left out.
                   `skill` is 1 - MAPE/null
    own null       the same of medians of the set's own rows: it knows the answers, and nothing else
    inside         share of runs within what is told beside a prediction as ±
    memory         MAPE of the peak that an allocator saw: rank 0's, allocated, or as the row says
    false fits     runs that ran out of memory and were said to fit, and not only tightly; false no: runs that ran and were
                   said not to. `OOM, tight` and `ran, tight` are those that were said to fit tightly
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

from common import RESULTS
from published import Run, read_rows, read_run
from weft.plan.columns import stack
from weft.plan.memory.footprint import footprint
from weft.plan.time.constants import CONSTANTS
from weft.plan.time.step import step_time

FITTED = (
    "megatron-sc21", "korthikanti22", "megatron-2020-09", "dgxc-benchmarking", "nemo-24.07", "nemo-longseq", "simumax-b200",
    "llm-foundry-mpt", "internevo", "single", "recalled-single", "vtrain-single", "nanotron-ultrascale",
    "nanotron-ultrascale-failed",
)  # fmt: skip
"""Sets of which every second row was fitted to; of no other set was a row looked at then."""
LATER = ("megatron-bridge", "megatron-bridge-blackwell")
"""Sets of which every second row was fitted to when these had been scored: who launches experts, and cards of Blackwell."""
SWEEPS = ("vtrain-single", "nanotron-ultrascale")
"""Every layout that would run of small models: most are far slower than anybody would train with."""
Rates = dict[str, float]
"""Card and precision → the median FLOP/s of a GPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs, left_out = read(args.rows)
    rates = fitted_rates(runs) or json.loads((RESULTS / "planner.json").read_text(encoding="utf-8"))["rates"]
    report = score(runs, rates) | {"rates": rates, "left out": left_out}
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
        except (TypeError, AttributeError, ArithmeticError, AssertionError) as error:  # a word where a number belongs
            reasons[f"not in this form: {error}"[:80]] += 1
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
    sure: np.ndarray

    def rows(self, ids: list[int]) -> Predicted:
        return Predicted(*(getattr(self, field.name)[ids] for field in fields(self)))


def predict(runs: list[Run]) -> Predicted:
    work = stack([run.work for run in runs])
    held, first = footprint(work), footprint(work, first=True)
    time, fits, sure = step_time(work), held.fits(work.machine), held.sure(work.machine)
    told = np.where([run.fullest for run in runs], held.allocated, first.allocated)
    told = told / np.where([run.reserved for run in runs], CONSTANTS.usable, 1.0)  # the rest are holes
    told = told + np.where([run.all for run in runs], held.outside, 0.0)
    return Predicted(*map(np.asarray, (time.total, time.spread, told, first.spread, fits, sure)))


def fitted_on(run: Run) -> bool:
    """Whether constants were fitted with this run."""
    return run.set in FITTED + LATER and int.from_bytes(run.name.encode()[-4:]) % 2 == 0


def stalls(run: Run) -> bool:
    """Runs of the one set whose pipelines wait 0.1 to 1.5 s in each micro-batch, whatever its size: docs/accuracy.md."""
    return run.set == "nanotron-ultrascale" and run.layout.pp > 1


def score(runs: list[Run], rates: Rates) -> dict[str, Any]:
    predicted = predict(runs)
    sets = defaultdict(list)
    for index, run in enumerate(runs):
        sets[run.set].append(index)
    groups = {
        "all": list(range(len(runs))),
        "unseen": [i for i, run in enumerate(runs) if not fitted_on(run)],
        "unseen, 100 GPUs or more": [i for i, run in enumerate(runs) if not fitted_on(run) and run.layout.world >= 100],
        "held-out sets, 100 GPUs or more": [
            i for i, run in enumerate(runs) if run.set not in FITTED + LATER and run.layout.world >= 100
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
        return figures([runs[i] for i in ids], predicted.rows(ids), rates)

    return {
        "sets": {name: of(ids) for name, ids in sets.items()},
        "together": {name: of(ids) for name, ids in groups.items() if ids},
        "split": f"fitted to: every second row of {', '.join(FITTED)}; later, of {', '.join(LATER)}",
    }


def figures(runs: list[Run], predicted: Predicted, rates: Rates) -> dict[str, Any]:
    seconds, memory, fits = predicted.seconds, predicted.bytes, predicted.fits
    timed = [i for i, run in enumerate(runs) if run.seconds and not run.duplicate]
    ratio = np.array([seconds[i] / runs[i].seconds for i in timed])
    found: dict[str, Any] = {"rows": len(runs), "timed": len(timed)}
    if timed:
        off = np.abs(ratio - 1)
        found |= {"MAPE": pct(off.mean()), "bias": pct((ratio - 1).mean())}
        nulls = {"null": null_model([runs[i] for i in timed], rates), "own null": own_null([runs[i] for i in timed])}
        for name, null in nulls.items():
            known = ~np.isnan(null)
            error = np.abs(null[known] - 1).mean() if known.any() else 0.0
            if error > 0:  # a set of one run is its own median
                skill = round(float(1 - off[known].mean() / error), 2)
                found |= {name: pct(error), name.replace("null", "skill"): skill}
        found["without a null"] = int(np.isnan(nulls["null"]).sum())
        within = np.exp(np.abs(np.log(ratio))) <= 1 + predicted.within[timed]
        found["inside"] = pct(within.mean())
    weighed = [i for i, run in enumerate(runs) if run.memory]
    if weighed:
        off = np.array([memory[i] / runs[i].memory for i in weighed])
        found |= {
            "memory MAPE": pct(np.abs(off - 1).mean()),
            "memory bias": pct((off - 1).mean()),
            "memory inside": pct((np.abs(off - 1) <= predicted.memory_within[weighed]).mean()),
            "weighed": len(weighed),
        }
    oom = np.array([run.status.startswith("oom") for run in runs])
    ran, tight = np.array([bool(run.seconds) for run in runs]), fits & ~predicted.sure
    found |= {
        "OOM": oom.sum(), "false fits": (oom & predicted.sure).sum(), "OOM, tight": (oom & tight).sum(),
        "false no": (ran & ~fits).sum(), "ran, tight": (ran & tight).sum(),
    }  # fmt: skip
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


def fitted_rates(runs: list[Run]) -> Rates:
    """What the null model knows: medians of the rows that were fitted to, without SWEEPS where there are others."""
    kinds: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {False: [], True: []})
    for run in runs:
        if run.seconds and not run.duplicate and fitted_on(run) and run.set in FITTED:
            kinds[f"{card(run)} {run.job.matmul}"][run.set in SWEEPS].append(hardware_flops(run) / run.seconds)
    return {kind: median(rates[False] or rates[True]) for kind, rates in sorted(kinds.items())}


def null_model(runs: list[Run], rates: Rates) -> np.ndarray:
    """Predicted over measured, if all runs of a GPU and precision had its rate; nan where none is known."""
    return np.array([hardware_flops(run) / (run.seconds or 1) / _rate(run, rates) for run in runs])


def _rate(run: Run, rates: Rates) -> float:
    name, low = card(run), run.job.matmul == "fp8"
    if rate := rates.get(f"{name} {run.job.matmul}"):
        return rate
    peaks = run.cluster.peak_8bit_tflops / run.cluster.peak_tflops
    other = rates.get(f"{name} {'16 bit' if low else 'fp8'}", float("nan"))
    return other * peaks if low else other / peaks


def own_null(runs: list[Run]) -> np.ndarray:
    """Predicted over measured, if all runs of a set, GPU and precision had the median TFLOP/s of them."""
    rates = [hardware_flops(run) / (run.seconds or 1) for run in runs]
    kinds = defaultdict(list)
    for run, rate in zip(runs, rates, strict=True):
        kinds[run.set, run.gpu, run.job.matmul].append(rate)
    return np.array(
        [rate / median(kinds[run.set, run.gpu, run.job.matmul]) for run, rate in zip(runs, rates, strict=True)]
    )


def card(run: Run) -> str:
    """The GPU's name, whatever its memory: H100."""
    return next(word for word in run.cluster.title.split() if any(letter.isdigit() for letter in word))


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
        "own null",
        "inside",
        "memory MAPE",
        "memory bias",
        "false fits",
        "OOM, tight",
        "false no",
        "ran, tight",
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
