"""Calibration by two processes at once: messages are measured, and all have the same curves."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import make, run_forked

from weft.launch.process import Process
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.show.text import write_cluster
from weft.tune import calibrate
from weft.tune.measure import Sizes

SMALL = Sizes(
    rows=(16, 64), columns=(16, 32, 64), numbers=(2**12, 2**13), lengths=(16, 32), head_dims=(16, 32), vocabs=(64, 256),
    bytes=(2**12, 2**14), flops=2**20,
)  # fmt: skip


def test_two_processes_measure_the_same_machine(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        calibrate.QUICK["cpu"] = SMALL
        found = calibrate.calibrate(Process(rank, 2, rank, torch.device("cpu")), "quick")
        write_cluster(found, tmp_path / f"{rank}.toml")

    run_forked(2, work)
    mine, theirs = (read_cluster(str(tmp_path / f"{rank}.toml")) for rank in range(2))
    assert mine == theirs
    assert mine.curves is not None
    assert mine.curves.processes == mine.gpus == 2
    assert min(mine.curves.message("all_reduce_fp32", 2, size) for size in (2**12, 2**20)) > 0
    for model, layout in (("llama", "dp2"), ("llama", "tp2.sp"), ("llama", "pp2.mb1"), ("mixtral", "fsdp2.ep2.bf16"),
                          ("llama", "cp2.ring"), ("llama", "fsdp2.full.mb1"), ("gpt2", "cp2.ulysses")):  # fmt: skip
        config = make(model, layout)
        plan = Plan.of(config.model, config.layout, Job(seq=16, global_batch=16), mine)
        assert 0 < plan.seconds < 60, layout
