"""`weft tune` as a user meets it: real trials of two processes, a table, a config to train with; and again for nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import slurm_lab
from forked import settings
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.load import load_config
from weft.config.toml import config_toml
from weft.tune import tune


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


TRIALS = """
import subprocess, sys
from pathlib import Path
from weft.config.load import load_config
from weft.tune.trial import run_trial

run, out = sys.argv[1:]
options = ["--cluster", "laptop-cpux2", "--top", "1", "--steps", "2", "--no-vary", "--out", out]
subprocess.run([sys.executable, "-m", "weft", "tune", run, *options], check=True)
config = load_config([Path(run)])
nowhere = config.data.model_copy(update={"paths": (str(Path(run).parent / "none"),)})
wrong = run_trial(config.model_copy(update={"data": nowhere}), 2, 120, Path(run).parent / "wrong")
print("wrong:", wrong.failed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not slurm_lab.possible(), reason="Slurm is not installed, or this is not root")
def test_trials_run_over_all_nodes_of_an_allocation(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dp2.mb1")
    (tmp_path / "run.toml").write_text(config_toml(config))
    out, lab = tmp_path / "tuned.toml", tmp_path / "lab"
    command = ["salloc", "--nodes=2", sys.executable, "-c", TRIALS, str(tmp_path / "run.toml"), str(out)]
    done = slurm_lab.around(lab, 2, command, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 2
    assert all(len(row["results"][-1]["steps"]) == 2 and not row["results"][-1]["failed"] for row in rows)
    assert load_config([out]).layout.world == 2
    steps = [
        re.findall(r"launch task StepId=(\S+) ", (lab / f"slurmd-{node}.log").read_text()) for node in ("n1", "n2")
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 3, "each trial, and the wrong one, is a step of both nodes"
    assert "none.bin does not exist" in done.stdout
