"""Claim: every layout of a 405B model on 16,384 GPUs is predicted in less than a second, on one core.

    python benchmarks/plan_search.py

Each row is one whole search: candidates made, memory and time of each, the best ten, the rivals of every axis and the
nearest that fits. Wall and CPU seconds, median, smallest and largest of the rounds, all rows taking turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from common import alternate, shown, spread, write
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.search import search
from weft.presets import preset_shape

ROWS = {
    "llama3-405b on 16,384 H100": ("llama3-405b", "h100x16384", Job(seq=8192, global_batch=2048)),
    "llama3-8b on 64 H100": ("llama3-8b", "h100x64", Job(seq=8192, global_batch=512)),
    "mixtral-8x7b on 256 H100": ("mixtral-8x7b", "h100x256", Job(seq=4096, global_batch=1024)),
}
LIMIT = 1.0


class Timed:
    """One search; keeps its CPU seconds and the number of its candidates."""

    def __init__(self, model: str, cluster: str, job: Job) -> None:
        self.shape, self.cluster, self.job = preset_shape(model), read_cluster(cluster), job
        self.cpu, self.candidates = list[float](), 0

    def __call__(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        found = search(self.shape, self.job, self.cluster)
        found.best(10)
        found.rivals()
        found.nearest()
        self.candidates = len(found)
        self.cpu.append(time.process_time() - cpu)
        return time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    timed = {name: Timed(*row) for name, row in ROWS.items()}
    calls: dict[str, Callable[[], float]] = dict(timed)
    walls = alternate(calls, options.rounds)
    rows = {}
    for name, row in timed.items():
        rows[name] = {"candidates": row.candidates, "wall_s": spread(walls[name]), "cpu_s": spread(row.cpu)}
        print(
            f"{name:28} {row.candidates:>9,} layouts, {rows[name]['wall_s']['median']:.3f} s, CPU {min(row.cpu):.3f} s"
        )
    first = rows[next(iter(ROWS))]["cpu_s"]["median"]
    print(
        f"written: {shown(write('plan_search', {'limit_s': LIMIT, 'holds': first < LIMIT, 'rows': rows}, ('numpy',)))}"
    )


if __name__ == "__main__":
    main()
