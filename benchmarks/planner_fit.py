"""Fits plan/time/constants.py, and the efficiencies of the clusters, to the rows that planner.py says are fitted on.

    python benchmarks/planner_fit.py ../shared/data/published-runs.jsonl.gz

Every number is tried a little larger and smaller, within the bounds that physics gives; what makes the fitted rows
better stays. Prints what it found; a person writes it down. The error that counts is |log(predicted/measured)|, no row
more than 0.6, no set more than the square root of its rows.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from planner import fitted_on, read
from published import Run
from weft.plan.columns import stack
from weft.plan.time.constants import CONSTANTS
from weft.plan.time.step import step_time
from weft.plan.work import Work

FIXED = ("outside", "communicator", "usable", "attention_length", "short_head", "ep_hidden", "cpu_adam")
SHARES = (
    "wave",
    "hbm",
    "nvlink",
    "network",
    "tp_hidden",
    "dp_hidden",
    "pp_exposed",
    "attention_backward",
    "fsdp_hidden",
    "flash2",
)
LEAST = {"adam": 20.0}
"""Gradient, weight and moments, read, and all but the gradient written."""
CHIP = ("gemm", "gemm8", "attention")
BEST = {"V100": 0.80, "A100": 0.87, "Hopper": 0.80, "B200": 0.78, "GB200": 0.73}
"""Share of the peak of the best products that others have measured: no fit goes beyond (stas00/ml-engineering)."""
STRAY = 0.15  # no number goes farther from where it began, unless a datasheet is silent about it


def family(title: str, name: str) -> str:
    """Cards of the same chip have the same efficiencies; but that of products falls with the power that a card is given."""
    card = next(word for word in title.split() if any(letter.isdigit() for letter in word))
    if "B" in card and name == "attention":
        return "Blackwell"
    return "Hopper" if "H" in card else "GB200" if card.startswith("GB") else card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    runs = [run for run in read(args.rows)[0] if run.seconds and not run.duplicate and fitted_on(run)]
    fit = Fit(runs)
    print(f"{len(runs)} rows, error {fit.error():.4f}")
    step = 0.25
    for _ in range(args.rounds):
        fit.round(step)
        step /= 1.7
        print(f"error {fit.error():.4f}", flush=True)
    for field in fields(CONSTANTS):
        if field.name not in FIXED:
            print(f"    {field.name}: float = {getattr(CONSTANTS, field.name):.3g}")
    for (kind, name), value in sorted(fit.chips.items()):
        print(f"{kind} {name} {value:.3f}")


class Fit:
    def __init__(self, runs: list[Run]) -> None:
        self.measured = np.array([run.seconds for run in runs])
        self.work: Work = stack([run.work for run in runs])
        sets = Counter(run.set for run in runs)
        self.weights = np.array([sets[run.set] ** -0.5 for run in runs])
        self.weights /= self.weights.sum()
        self.kinds = {name: np.array([family(run.cluster.title, name) for run in runs]) for name in CHIP}
        self.chips = {
            (kind, name): float(getattr(self.work.machine, name)[self.kinds[name] == kind][0])
            for name in CHIP for kind in sorted(set(self.kinds[name]))
        }  # fmt: skip
        self.first = dict(self.chips)

    def error(self) -> float:
        columns = {name: np.array(getattr(self.work.machine, name)) for name in CHIP}
        for (kind, name), value in self.chips.items():
            columns[name][self.kinds[name] == kind] = value
        work = replace(self.work, machine=replace(self.work.machine, **columns))
        off = np.abs(np.log(step_time(work).total / self.measured))
        return float((np.minimum(off, 0.6) * self.weights).sum())

    def round(self, step: float) -> None:
        best = self.error()
        for field in fields(CONSTANTS):
            if field.name in FIXED:
                continue
            for factor in (1 + step, 1 / (1 + step)):
                old = getattr(CONSTANTS, field.name)
                value = old * factor
                value = max(value, LEAST.get(field.name, 0.0))
                setattr(CONSTANTS, field.name, min(value, 0.93) if field.name in SHARES else value)
                if (error := self.error()) < best:
                    best = error
                else:
                    setattr(CONSTANTS, field.name, old)
        for key in self.chips:
            for factor in (1 + step / 2, 1 / (1 + step / 2)):
                old = self.chips[key]
                bound = self.first[key] * (1 + STRAY)
                bound = min(bound, BEST.get(key[0], 1.0)) if key[1] == "gemm" else bound
                low = self.first[key] * (1 - STRAY)
                self.chips[key] = min(bound, max(low, old * factor))
                if (error := self.error()) < best:
                    best = error
                else:
                    self.chips[key] = old


if __name__ == "__main__":
    main()
