"""`weft tune` as a user meets it: real trials of two processes, a table, a config to train with; and again for nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from forked import settings
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.load import load_config
from weft.config.toml import config_toml
from weft.tune import tune
from weft.tune.trial import run_trial, trial_config


@pytest.mark.slow
def test_the_fastest_of_real_trials_becomes_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "run", "dp2.mb1")
    (tmp_path / "run.toml").write_text(config_toml(config))
    out = tmp_path / "tuned.toml"
    command = ["tune", str(tmp_path / "run.toml"), "--cluster", "laptop-cpux2", "--out", str(out), "--top", "1"]
    command += ["--steps", "2", "--no-vary"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 2
    assert "dp2.mb1" in {row["layout"] for row in rows}
    results = {row["layout"]: row["results"][-1] for row in rows}
    assert all(
        len(result["steps"]) == 2 and result["memory"] > 2**27 and not result["failed"] for result in results.values()
    )
    tuned = load_config([out])
    assert str(tuned.layout) == min(results, key=lambda name: results[name]["seconds"])
    assert tuned.data == config.data
    assert "← fastest" in done.output
    assert not (tmp_path / "run" / "checkpoints").exists()

    assert (tmp_path / "tuned.svg").read_text().startswith("<svg")

    monkeypatch.setattr(tune, "run_trial", lambda *_: pytest.fail("all of it was measured"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert load_config([out]) == tuned


SRUN = """
import subprocess, sys
nodes = next(int(word.removeprefix("--nodes=")) for word in sys.argv if word.startswith("--nodes="))
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
running = [subprocess.Popen(command) for _ in range(nodes)]
sys.exit(max(abs(one.wait()) for one in running))
"""
"""Slurm's, as far as trials ask for it: one command a node, all nodes being this machine."""


@pytest.mark.slow
def test_a_trial_runs_over_all_nodes_of_an_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("srun", SRUN), ("scontrol", "print('127.0.0.1')")):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in (("JOB_NUM_NODES", "2"), ("JOB_ID", str(os.getpid())), ("JOB_NODELIST", "node[1-2]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    config = trial_config(settings(tmp_path / "run", "dp2"), 2, tmp_path / "tokens")
    result = run_trial(config, 2, 120, tmp_path / "dp2")
    assert not result.failed, (tmp_path / "dp2" / "output.txt").read_text()
    assert len(result.steps) == 2
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"paths": (str(tmp_path / "none"),)})})
    assert "none.bin does not exist" in run_trial(wrong, 2, 120, tmp_path / "wrong").failed
