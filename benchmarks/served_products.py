"""Products of a few rows on this CPU: torch's own, and ours where it may be chosen, in one run, taking turns.

    python benchmarks/served_products.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/served_products.py --dtypes bfloat16   # torch as without tiles

A ratio is torch's seconds over ours, of one pair of neighbouring rounds: above 1, ours is faster. Matrices are 200 MB
altogether, so that they come from memory. Seconds are those of one thread's own work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from common import alternate, shown, spread, write
from weft.serve.kernels.native import library, rows_product

MATRICES = {
    "2304 x 768": (2304, 768),
    "768 x 3072": (768, 3072),
    "6400 x 1600": (6400, 1600),
    "50257 x 768": (50257, 768),
}
"""Of GPT-2 124M, and one of 1.5B: outputs and inputs."""

TOTAL = 200_000_000
"""Bytes of all matrices of a size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="served_products", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if library() is None:
        parser.error("there is no C++ compiler, so there are no kernels of ours")
    points = []
    for dtype in options.dtypes:
        for name, (outputs, inputs) in MATRICES.items():
            for rows in options.rows:
                point = {
                    "dtype": dtype,
                    "matrix": name,
                    "rows": rows,
                    **compare(dtype, outputs, inputs, rows, options.rounds),
                }
                points.append(point)
                print(point, flush=True)
    head = {
        "question": "how fast do our kernels multiply few rows, next to torch?",
        "instructions": torch.backends.cpu.get_cpu_capability(), "limit": os.environ.get("ONEDNN_MAX_CPU_ISA", "none"),
    }  # fmt: skip
    path = write(options.results, head | {"points": points})
    print(f"written to {shown(path)}")


@torch.inference_mode()
def compare(dtype: str, outputs: int, inputs: int, rows: int, rounds: int) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    size = outputs * inputs * kind.itemsize
    matrices = [torch.randn(outputs, inputs).to(kind) for _ in range(max(1, TOTAL // size))]
    x = torch.randn(rows, inputs).to(kind)
    ways = {
        "torch": lambda: [F.linear(x, matrix) for matrix in matrices],
        "ours": lambda: [rows_product(x, matrix, None) for matrix in matrices],
    }
    found = alternate({name: partial(timed, run) for name, run in ways.items()}, rounds + 1)
    seconds = {name: each[1:] for name, each in found.items()}  # the first round warms up
    ratios = [theirs / ours for theirs, ours in zip(seconds["torch"], seconds["ours"], strict=True)]
    rates = [size * len(matrices) / each / 1e9 for each in seconds["ours"]]
    return {"ours_gb_per_s": spread(rates, 1), "over_torch": spread(ratios)}


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
