"""A pipeline schedule of the user's own: written as a table, checked, and trained with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import settings, train

from weft.config.toml import config_toml
from weft.train.log import read_log


def weft(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(
        [sys.executable, "-m", "weft", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**env, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_by_a_table_of_ones_own(tmp_path: Path) -> None:
    """A V with two stages on each process, changed by hand: of evaluation too it is a V."""
    table = tmp_path / "own.csv"
    made = weft("plan", "schedule", "zbv", "--pp", 2, "--micro-batches", 4, "--csv", table)
    assert made.returncode == 0, made.stderr
    whole = table.read_text().replace("0I3", "0B3").replace("0W3", "")  # one W is not put off after all
    assert whole != table.read_text()
    over = {"train": {"steps": 4, "eval_every": 2, "eval_batches": 1}, "model": {"num_layers": 4}}
    single = settings(tmp_path / "single", **over)  # type: ignore[arg-type]
    train(single)
    (tmp_path / "run.toml").write_text(config_toml(single))
    arguments = ("train", tmp_path / "run.toml", "--run", tmp_path / "own", "--layout", f"pp2.vp2.csv({table}).mb2")
    table.write_text(whole.replace("0F0", "", 1))
    refused = weft(*arguments)
    assert (refused.returncode, "F of stage 0, micro-batch 0 is missing" in refused.stderr) == (2, True)
    table.write_text(whole)
    done = weft(*arguments)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "valid_loss"):
        losses = [[line[name] for line in read_log(run) if line.get(name)] for run in (single.run, tmp_path / "own")]
        assert len(losses[1]) == (4 if name == "loss" else 2)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
