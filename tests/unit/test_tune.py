"""What is tried, what is kept of it, and what is said; trials themselves are stood in for by their results."""

from __future__ import annotations

import json
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_calibrate import cluster, round_machine
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.load import load_config, make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.plan.text import write_cluster
from weft.tune import trial, tune
from weft.tune.candidates import Candidate, candidates
from weft.tune.table import TuneTable, digest, show_table
from weft.tune.trial import WARM_UP, Result, run_trial, trial_config

LLAMA = {
    "family": "llama", "num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 128, "vocab": 256,
    "max_seq": 64,
}  # fmt: skip
MEASURED = cluster(round_machine())


def settings(layout: str = "single", **train: Any) -> Config:
    return make_config({"model": LLAMA, "layout": layout, "train": {"global_batch": 8, "device": "cpu", **train}})


def shown(table: TuneTable) -> str:
    console = Console(width=160, record=True, file=StringIO())
    show_table(table, console)
    return console.export_text()


# -- candidates -------------------------------------------------------------------------------------------------------


def test_candidates_are_the_fastest_that_fit_in_the_runs_own_precision() -> None:
    found = candidates(settings(), MEASURED, 5, "cpu")
    assert len(found) == 5
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert {one.layout.precision for one in found} == {"fp32"}
    assert {one.layout.world for one in found} == {2}
    low = candidates(settings("bf16.chunked"), MEASURED, 3, "cpu")
    assert {(one.layout.precision, one.layout.loss) for one in low} == {("bf16", "chunked")}


def test_weights_stay_on_the_cpu_where_the_run_has_them() -> None:
    found = candidates(settings("fsdp2.offloadweights"), MEASURED, 3, "cpu")
    assert all(one.layout.offload_weights for one in found)


def test_the_runs_own_layout_is_tried_too_and_none_twice() -> None:
    slow = "fsdp2.mb1.full"
    found = candidates(settings(slow), MEASURED, 2, "cpu")
    assert [str(one.layout) for one in found][2:] == [slow]
    best = candidates(settings(), MEASURED, 1, "cpu")[0].layout
    again = candidates(settings(str(best)), MEASURED, 2, "cpu")
    assert len(again) == 2
    sizes = [str(one.layout.model_copy(update={"micro_batch": one.layout.micro_batch_size(8)})) for one in again]
    assert len(set(sizes)) == 2


def test_no_candidate_is_said_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no layout .* fits 2 processes of 0\.1 GiB.*lower train\.global_batch"):
        candidates(settings(), cluster(round_machine(), memory_gib=0.1), 3, "cpu")


# -- the table --------------------------------------------------------------------------------------------------------


@cache
def three() -> list[Candidate]:
    return candidates(settings(), MEASURED, 3, "cpu")


def planned() -> TuneTable:
    return TuneTable("this").planned(three())


def test_the_table_remembers_and_names_the_winner(tmp_path: Path) -> None:
    table = planned()
    first, second, third = (row.layout for row in table.rows)
    assert len(table.waiting) == 3
    assert table.winner is None
    assert table.mean_error is None
    table = table.found(first, Result(2 * table.rows[0].predicted_seconds, (1.0,), 2**28))
    table = table.found(second, Result(failed="out of memory"))
    table.write(tmp_path / "table.json")
    again = TuneTable.read(tmp_path / "table.json", "this").planned(three())
    assert TuneTable.read(tmp_path / "table.json", "this") == table
    assert [row.layout for row in again.waiting] == [second, third]  # what has failed is tried again
    assert again.winner is not None
    assert again.winner.layout == first
    assert again.winner.error == pytest.approx(-0.5)
    text = shown(table)
    assert "-50%" in text
    assert "out of memory" in text
    assert "not run" in text
    assert "← fastest" in text
    assert "mean error of the predicted times: 50%" in text


def test_what_was_measured_of_another_run_says_nothing(tmp_path: Path) -> None:
    table = planned().found(planned().rows[0].layout, Result(1.0, (1.0,), 1))
    table.write(tmp_path / "table.json")
    assert TuneTable.read(tmp_path / "table.json", "other").rows == ()
    assert TuneTable.read(tmp_path / "missing.json", "other").rows == ()
    one, other = settings(), settings(global_batch=16)
    assert digest(one, 3) != digest(other, 3)
    assert digest(one, 3) != digest(one, 4)
    assert digest(one, 3) == digest(settings("tp2"), 3)


def test_a_file_that_is_no_table_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match="is no table of trials: move it away"):
        TuneTable.read(tmp_path / "table.json", "this")


# -- trying -----------------------------------------------------------------------------------------------------------


def test_only_what_is_not_known_is_tried_and_a_break_loses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def instead(config: Config, steps: int, limit: float, folder: Path) -> Result:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(str(config.layout))
        return Result(3.0 - len(tried), (1.0,), 2**28)

    monkeypatch.setattr(tune, "run_trial", instead)
    table, out = planned(), tmp_path / "tuned.toml"
    names = [row.layout for row in table.rows]
    with pytest.raises(KeyboardInterrupt):
        tune.try_all(settings(), table, 3, 60, out, lambda *_: None)
    assert tried == names[:2]
    kept = TuneTable.read(tmp_path / "tuned.json", "this").planned(three())
    assert [row.layout for row in kept.waiting] == names[2:]
    tried.clear()
    done = tune.try_all(settings(), kept, 3, 60, out, lambda *_: None)
    assert tried == names[2:]
    assert not done.waiting
    winner = tune.write_winner(settings(), done, out)
    assert winner.layout == names[1]
    written = load_config([out])
    assert str(written.layout) == names[1]
    assert written.train == settings(seq=64).train


def test_without_a_single_measurement_nothing_is_written(tmp_path: Path) -> None:
    table = planned()
    for row in table.rows:
        table = table.found(row.layout, Result(failed="out of memory"))
    with pytest.raises(ValueError, match=r"no layout was measured, so there is no config to write: .*out of memory"):
        tune.write_winner(settings(), table, tmp_path / "tuned.toml")
    assert not (tmp_path / "tuned.toml").exists()


def test_a_trial_has_the_runs_settings_and_data_of_its_own(tmp_path: Path) -> None:
    config = settings("dp2", eval_every=5)
    tried = trial_config(config, "tp2", 4, tmp_path / "trials" / "tokens")
    assert str(tried.layout) == "tp2"
    assert tried.train.steps == WARM_UP + 4
    assert tried.train.eval_every == 0
    assert (tried.model, tried.optimizer) == (config.model, config.optimizer)
    assert Path(tried.data.paths[0]).with_suffix(".idx").exists()


@pytest.mark.parametrize(
    ("program", "limit", "said"),
    [
        ("import time; time.sleep(60)", 0.3, "not done after 0 s"),
        ("import sys; print('weft: error: no room', file=sys.stderr); sys.exit(2)", 60, "no room"),
        ("raise MemoryError('of 3 GiB')", 60, "MemoryError: of 3 GiB"),
        ("import os; os.kill(os.getpid(), 9)", 60, "ended by SIGKILL"),
    ],
)
def test_what_ends_a_trial_ends_nothing_else(
    program: str, limit: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = trial.subprocess.Popen
    monkeypatch.setattr(trial.subprocess, "Popen", lambda command, **rest: popen([command[0], "-c", program], **rest))
    result = run_trial(settings(), 3, limit, tmp_path / "dp2")
    assert result == Result(failed=said)


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_lists_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings("dp2")))
    monkeypatch.setattr(tune, "run_trial", lambda *_: pytest.fail("a dry run runs nothing"))
    out = tmp_path / "tuned.toml"
    arguments = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--top", "3", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert done.output.count("not run") in (3, 4)
    assert not out.exists()
    assert not out.with_suffix(".json").exists()


def test_an_output_that_is_no_config_is_refused() -> None:
    done = CliRunner().invoke(app, ["tune", "--model", "gpt2-124m", "--out", "tuned.json"])
    assert "is a config for `weft train`, a .toml" in str(done.exception)


def test_results_are_json_as_they_lie(tmp_path: Path) -> None:
    table = planned().found(planned().rows[0].layout, Result(1.5, (1.0, 1.5, 2.0), 2**30))
    table.write(tmp_path / "table.json")
    tree = json.loads((tmp_path / "table.json").read_text())
    assert tree["rows"][0]["result"] == {"seconds": 1.5, "steps": [1.0, 1.5, 2.0], "memory": 2**30, "failed": ""}


def test_a_break_shows_what_there_is_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings()))
    given = iter([Result(1.5, (1.5,), 2**28)])

    def instead(*_: object) -> Result:
        try:
            return next(given)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(tune, "run_trial", instead)
    out = tmp_path / "tuned.toml"
    arguments = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--top", "3"])
    assert done.exit_code == 130
    text = " ".join(done.output.split())
    assert "1.5 s" in text
    assert text.count("not run") == 2
    assert "the same command goes on from there" in text
    assert not out.exists()


def test_data_that_cannot_be_trained_on_are_refused_before_the_first_trial(tmp_path: Path) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    config = make_config({**settings().model_dump(), "data": {"paths": [str(tmp_path / "missing")]}})
    (tmp_path / "run.toml").write_text(config_toml(config))
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml")])
    assert "missing.bin does not exist" in str(done.exception)
