"""`weft tune` as a user meets it: real trials of two processes, a table, a config to train with; and again for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
    command += ["--steps", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 2
    assert "dp2.mb1" in {row["layout"] for row in rows}
    results = {row["layout"]: row["result"] for row in rows}
    assert all(
        len(result["steps"]) == 2 and result["memory"] > 2**27 and not result["failed"] for result in results.values()
    )
    tuned = load_config([out])
    assert str(tuned.layout) == min(results, key=lambda name: results[name]["seconds"])
    assert tuned.data == config.data
    assert "← fastest" in done.output
    assert not (tmp_path / "run" / "checkpoints").exists()

    monkeypatch.setattr(tune, "run_trial", lambda *_: pytest.fail("all of it was measured"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert load_config([out]) == tuned
