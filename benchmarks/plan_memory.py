"""Claim: the memory of the layouts that `weft plan` puts first is what `weft train --dry-run` counts.

    python benchmarks/plan_memory.py --draws 40

Models, clusters and jobs are drawn at random; of each the best three layouts are counted moment by moment
(plan/memory/moments.py, which is held against real runs). Ratios of the plan's bytes to the counted ones: the median, and
what nine of ten lie between. The worst are named, both ways.
"""

from __future__ import annotations

import argparse
import random

import numpy as np

from common import shown, write
from weft.config.load import make_config
from weft.plan.machine import cluster_names, read_cluster
from weft.plan.memory.moments import largest, layout_memory
from weft.plan.numbers import Job
from weft.plan.search import search
from weft.presets import preset_names, preset_shape

GPUS = (1, 2, 4, 8, 16, 24, 64, 72, 128, 256, 512, 1024, 4096)
LENGTHS = (512, 1024, 2048, 4096, 8192, 32768)
BATCHES = (1, 3, 8, 16, 64, 96, 256, 1000, 1024, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    rows: dict[str, float] = {}
    nothing = 0
    for _ in range(options.draws):
        found = drawn()
        nothing += not found
        rows |= found
    ratios = np.array(list(rows.values()))
    low, median, high = np.percentile(ratios, [5, 50, 95])
    near = float(np.mean(np.abs(ratios - 1) <= 0.15))
    print(f"{len(rows)} layouts, {nothing} draws without one: median {median:.3f}, 5 to 95 % {low:.2f} to {high:.2f}")
    print(f"within 15 %: {near:.0%}")
    order = sorted(rows, key=lambda name: rows[name])
    worst = {name: round(rows[name], 3) for name in (*order[:4], *order[-4:])}
    for name, ratio in worst.items():
        print(f"{ratio:.2f}  {name}")
    result = {"layouts": len(rows), "median": median, "p5": low, "p95": high, "within_15": near, "worst": worst}
    print(f"written: {shown(write('plan_memory', result, ('numpy',)))}")


def drawn() -> dict[str, float]:
    """Ratios of the best three layouts of a random plan, by name; none where nothing fits."""
    model, cluster, gpus = random.choice(preset_names()), random.choice(cluster_names()), random.choice(GPUS)
    job = Job(seq=random.choice(LENGTHS), global_batch=random.choice(BATCHES))
    try:
        plans = search(preset_shape(model), job, read_cluster(cluster, gpus)).best(3)
    except ValueError:  # a preset that is no language model, or longer than its positions
        return {}
    found = {}
    for plan in plans:
        sizes = {"global_batch": job.global_batch, "seq": job.seq}
        config = make_config({"model": model, "layout": str(plan.layout), "train": sizes})
        counted = largest(layout_memory(config, "cuda")).peak.tensors
        name = f"{model} on {gpus} {cluster}, {job.global_batch} of {job.seq}: {plan.layout}"
        found[name] = float(plan.memory.allocated) / counted
    return found


if __name__ == "__main__":
    main()
