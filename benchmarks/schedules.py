"""Claim: a pipeline waits as long as its schedule's table says, and no longer.

    python benchmarks/schedules.py
    python benchmarks/schedules.py --processes 4 --unit 0.05 --only zbv

weft's pipeline runs each schedule on gloo processes of this machine, with real messages and real backward passes of a
stand-in stage that sleeps instead of multiplying: `--unit` seconds for the forward of all stages of a process, as long
for the backward of the input, and for that of the weights. So as many processes as there are can share two cores, and other
work on the machine hardly matters. `bubble` is the share of all processes' time in which they are in no operation, beside
that of the table and of the formula; `length` the time of the step over that of the table. The schedules take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common import shown, spread, write
from weft.config.layout import Layout
from weft.parallel.mesh import make_mesh
from weft.parallel.pipeline import Pipeline
from weft.plan.schedules import named
from weft.schedules.formula import published_bubble
from weft.schedules.orders import ORDERS
from weft.schedules.table import Schedule
from weft.schedules.timeline import Costs, timeline

CHUNKS = 2
DIMS = (1, 16, 64)
"""Of what passes between stages."""


class Sleeper:
    """A stage that takes its time: parallel/pipeline.py's Work."""

    def __init__(self, schedule: Schedule, seconds: float) -> None:
        self.seconds, self.last_stage = seconds, schedule.num_stages - 1
        self.busy = 0.0

    def forward(self, stage: int, micro_batch: int, x: Tensor | None) -> Tensor:
        self._work(1)
        y = torch.ones(DIMS, requires_grad=True) if x is None else x
        return y.sum() if stage == self.last_stage else y * 1.0

    def backward(self, stage: int, micro_batch: int, y: Tensor, grad: Tensor | None, put_off: bool, last: bool) -> None:
        self._work(1 if put_off else 2)
        y.backward(grad)

    def weights(self, stage: int, micro_batch: int, last: bool) -> None:
        self._work(1)

    def _work(self, operations: int) -> None:
        begin = time.perf_counter()
        time.sleep(operations * self.seconds)
        self.busy += time.perf_counter() - begin


def one(rank: int, processes: int, tables: list[Schedule], options: argparse.Namespace, folder: Path) -> None:
    """A process: of each round and schedule, when its step began and ended, and how long it was busy."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh, found = make_mesh(Layout(pp=processes), torch.device("cpu")), []
    for turn in range(options.rounds + 1):  # the first connects
        for table in tables:
            work = Sleeper(table, options.unit / table.num_chunks)
            pipeline = Pipeline(mesh, DIMS, torch.float32, table)
            dist.barrier()
            begin = time.perf_counter()  # one clock for all processes of a machine
            pipeline.run(work)
            if turn:
                found.append((table.name, begin, time.perf_counter(), work.busy))
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measure(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    tables = [
        named(name, processes, CHUNKS, options.rate * processes) for name in ORDERS if name in (options.only or ORDERS)
    ]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            context.Process(target=one, args=(rank, processes, tables, options, Path(folder)))
            for rank in range(processes)
        ]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    runs: dict[str, Any] = {}
    for table in tables:
        bubbles, lengths = [], []
        line = timeline(table)
        planned = line.length * options.unit / table.num_chunks
        for steps in zip(*ranks, strict=True):
            if steps[0][0] == table.name:
                length = max(end for _, _, end, _ in steps) - min(begin for _, begin, _, _ in steps)
                bubbles.append(1 - sum(busy for *_, busy in steps) / (length * processes))
                lengths.append(length / planned)
        chunks, count = table.num_chunks, table.num_micro_batches
        formula = published_bubble(table.name, processes, chunks, count, Costs())
        assert formula is not None
        runs[f"{table.name}, {processes} processes, {count} micro-batches"] = {
            "bubble": spread(bubbles, 4),
            "table": round(line.bubble, 4),
            "formula": round(formula, 4),
            "length": spread(lengths),
        }
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rate", type=int, default=2, help="micro-batches for each process")
    parser.add_argument("--unit", type=float, default=0.04, help="seconds of a process's forward of one micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(ORDERS), help="these schedules; nothing is written")
    options = parser.parse_args()
    runs: dict[str, Any] = {}
    for processes in options.processes:
        for name, found in measure(processes, options).items():
            runs[name] = found
            told = (
                f"bubble {found['bubble']['median']:6.1%}  table {found['table']:6.1%}  formula {found['formula']:6.1%}"
            )
            print(f"{name:44} {told}  length × {found['length']['median']:.3f}", flush=True)
    if not options.only:
        given = {"unit": options.unit, "rounds": options.rounds, "chunks": CHUNKS}
        print(f"written: {shown(write('schedules', {'input': given, 'runs': runs}))}")


if __name__ == "__main__":
    main()
