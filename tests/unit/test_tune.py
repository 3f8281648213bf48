"""What is tried, what is kept of it, and what is said; trials themselves are stood in for by their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from test_calibrate import cluster, round_machine
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.config.load import load_config, make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.plan.show.text import write_cluster
from weft.plan.time.step import Time
from weft.tune import slurm, trial, tune, variants
from weft.tune.candidates import Candidate, Candidates, kept_of
from weft.tune.lesson import Lesson
from weft.tune.picture import draw_trials
from weft.tune.table import Row, TuneTable, digest, show_table
from weft.tune.trial import WARM_UP, Result, run_trial, trial_config
from weft.tune.tune import Session
from weft.tune.variants import micro_batches

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


@cache
def pool(layout: str = "single", messages: float = 1.0) -> Candidates:
    """On a machine of round numbers, whose messages take so many times as long."""
    return Candidates(settings(layout), cluster(round_machine(message_scale=messages)), "cpu")


def test_candidates_are_the_fastest_that_fit_in_the_runs_own_precision() -> None:
    found = pool().first(5)
    assert len(found) == 5
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert {one.layout.precision for one in found} == {"fp32"}
    assert {one.layout.world for one in found} == {2}
    low = pool("bf16.chunked").first(3)
    assert {(one.layout.precision, one.layout.loss) for one in low} == {("bf16", "chunked")}


def test_weights_stay_on_the_cpu_where_the_run_has_them() -> None:
    found = pool("fsdp2.offloadweights").first(3)
    assert all(one.layout.offload_weights for one in found)


def test_what_the_run_does_not_ask_for_the_plan_may() -> None:
    """A chunked loss, and offloading: where it says nothing of them, a layout of the search keeps its own."""
    assert kept_of(Layout.parse("fsdp2.bf16")) == {"precision": "bf16", "gradients": "fp32", "compile": False}
    assert kept_of(Layout.parse("fsdp2.offload.chunked")).items() >= {"offload": True, "loss": "chunked"}.items()


def test_the_next_sizes_of_a_micro_batch_that_go_are_tried() -> None:
    run = settings("fsdp2")
    run = run.model_copy(
        update={"train": run.train.model_copy(update={"global_batch": 36}), "layout": Layout.parse("fsdp2.mb3")}
    )
    assert [change["layout"]["micro_batch"] for change in micro_batches(run, "cpu")] == [2, 6]
    whole = run.model_copy(update={"layout": Layout.parse("fsdp2.mb18")})
    assert [change["layout"]["micro_batch"] for change in micro_batches(whole, "cpu")] == [9]


def test_the_runs_own_layout_is_tried_too_and_none_twice() -> None:
    slow = "fsdp2.mb1.full"
    found = pool(slow).first(2)
    assert [str(one.layout) for one in found][2:] == [slow]
    best = pool().first(1)[0].layout
    again = pool(str(best)).first(2)
    assert len(again) == 2
    sizes = [str(one.layout.model_copy(update={"micro_batch": one.layout.micro_batch_size(8)})) for one in again]
    assert len(set(sizes)) == 2


def test_no_candidate_is_said_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no layout .* fits 2 processes of 0\.1 GiB.*lower train\.global_batch"):
        Candidates(settings(), cluster(round_machine(), memory_gib=0.1), "cpu").first(3)


# -- what trials show -------------------------------------------------------------------------------------------------


def test_without_trials_the_plan_stands() -> None:
    one = three()[0]
    assert Lesson.of([]).expected(one.time) == pytest.approx(one.seconds)


def test_a_machine_that_is_slower_in_all_is_known_after_one_trial() -> None:
    first, *others = three()
    lesson = Lesson.of([(first.time, 1.7 * first.seconds)])
    assert lesson.expected(first.time) == pytest.approx(1.7 * first.seconds)
    for one in others:
        assert lesson.expected(one.time) == pytest.approx(1.7 * one.seconds, rel=0.02)


BUSY = 10.0
"""Of messages: with it they are a good part of a step, as planned."""


def true_seconds(time: Time, **scales: float) -> float:
    """As it is: parts take so many times as long as planned; by default pipelines are worse than a plan thinks."""
    scales = scales or {"pp": 3.0, "bubble": 3.0}
    return float(time.total) + sum((scale - 1) * getattr(time, name) for name, scale in scales.items())


def test_messages_that_are_quicker_than_planned_change_the_order() -> None:
    """What six trials show puts forty layouts nearer to where they are, and another one first: the right one."""
    there = pool(messages=BUSY).first(40)
    quick = dict.fromkeys(("tp", "cp", "ep", "dp", "pp"), 0.5)
    true = [true_seconds(one.time, **quick) for one in there]
    lesson = Lesson.of([(one.time, seconds) for one, seconds in zip(there[:6], true[:6], strict=True)])
    learned = [abs(lesson.expected(one.time) / time - 1) for one, time in zip(there, true, strict=True)]
    planned = [abs(one.seconds / time - 1) for one, time in zip(there, true, strict=True)]
    assert sum(learned) < 0.35 * sum(planned)
    chosen = min(range(40), key=lambda index: lesson.expected(there[index].time))
    assert chosen == true.index(min(true)) != 0


# -- the table --------------------------------------------------------------------------------------------------------


@cache
def three() -> list[Candidate]:
    return pool().first(3)


def planned() -> TuneTable:
    return TuneTable("this", tuple(Row.of(one, one.seconds) for one in three()))


def measured(row: Row, *results: Result) -> Row:
    return replace(row, results=results)


def test_the_table_remembers_and_names_the_winner(tmp_path: Path) -> None:
    table = planned()
    first, second, _ = table.rows
    assert table.winner is None
    table = table.with_row(measured(first, Result(2 * first.predicted_seconds, (1.0,), 2**28)))
    table = table.with_row(measured(second, Result(failed="out of memory")))
    table.write(tmp_path / "table.json")
    again = TuneTable.read(tmp_path / "table.json", "this")
    assert [row.layout for row in again.rows] == [first.layout]  # what has failed is tried again
    assert again.rows == table.rows[:1]
    assert again.winner is not None
    assert again.winner.error == pytest.approx(-0.5)
    text = shown(table)
    assert "-50%" in text
    assert "out of memory" in text
    assert "not run" in text
    assert "← fastest" in text
    assert "mean error of the planned times: 50%" in text


def test_a_longer_trial_counts_for_more() -> None:
    one, two, three = planned().rows
    table = planned().with_row(measured(one, Result(1.0, (1.0,), 1), Result(3.0, (3.0, 3.0), 1)))
    table = table.with_row(measured(two, Result(2.0, (2.0,), 1), Result(2.5, (2.5, 2.5), 1)))
    table = table.with_row(measured(three, Result(0.5, (0.5,), 1), Result(failed="out of memory")))
    assert table.winner is not None
    assert table.winner.layout == two.layout


def test_what_was_measured_of_another_run_says_nothing(tmp_path: Path) -> None:
    table = planned().with_row(measured(planned().rows[0], Result(1.0, (1.0,), 1)))
    table.write(tmp_path / "table.json")
    assert TuneTable.read(tmp_path / "table.json", "other").rows == ()
    assert TuneTable.read(tmp_path / "missing.json", "other").rows == ()
    one, other = settings(), settings(global_batch=16)
    assert digest(one, 3, 2) != digest(other, 3, 2)
    assert digest(one, 3, 2) != digest(one, 4, 2)
    assert digest(one, 3, 2) != digest(one, 3, 1)
    assert digest(one, 3, 2) == digest(settings("tp2"), 3, 2)
    for kept in ("tp2.bf16", "tp2.chunked", "fsdp2.offloadoptimizer"):  # which a search leaves as the run has them
        assert digest(settings(kept), 3, 2) != digest(one, 3, 2)


def test_why_a_trial_failed_is_no_markup() -> None:
    row = measured(planned().rows[0], Result(failed="no file [bold]a[/tmp/b]"))
    assert "no file [bold]a[/tmp/b]" in shown(planned().with_row(row))


def test_a_file_that_is_no_table_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match="is no table of trials: move it away"):
        TuneTable.read(tmp_path / "table.json", "this")


def test_the_picture_has_every_trial_and_names_them() -> None:
    table = planned()
    for row, factor in zip(table.rows, (2.0, 1.5, 1.0), strict=True):
        table = table.with_row(measured(row, Result(factor * row.predicted_seconds, (1.0,), 1)))
    root = ElementTree.fromstring(draw_trials(table))
    text = " ".join(root.itertext())
    assert all(row.layout in text for row in table.rows)
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 2 * len(table.rows)
    assert all(0 < float(dot.get("cx", 0)) < float(root.get("width", 0)) for dot in root.iter() if "circle" in dot.tag)


# -- trying -----------------------------------------------------------------------------------------------------------


class Stand:
    """In the place of real trials: their seconds are the plan's on a machine of slower pipelines, or as they are told."""

    def __init__(self, told: Callable[[Config, int], Result] | None = None) -> None:
        self.tried: list[tuple[str, int]] = []
        self.told, self.pool = told, pool(messages=BUSY)

    def __call__(self, config: Config, steps: int, limit: float, folder: Path) -> Result:
        self.tried.append((str(config.layout), steps))
        if self.told is not None:
            return self.told(config, steps)
        seconds = true_seconds(self.pool.of(config.layout).time)
        return Result(seconds, (seconds,) * steps, 2**28)


def session(out: Path, table: TuneTable | None = None, top: int = 4, layout: str = "single") -> Session:
    return Session(settings(layout), pool(layout, BUSY), table or TuneTable("this"), top, 3, 60, out, lambda _: None)


def test_trials_are_chosen_by_what_those_before_have_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    monkeypatch.setattr(tune, "run_trial", stand)
    by_plan = [str(one.layout) for one in stand.pool.first(4)]
    one = session(tmp_path / "tuned.toml", top=4)
    one.look()
    tried = [layout for layout, _ in stand.tried]
    assert tried[0] == by_plan[0]
    assert tried != by_plan
    seconds = {name: true_seconds(stand.pool.of(Layout.parse(name)).time) for name in {*by_plan, *tried}}
    assert sum(seconds[name] for name in tried) < sum(seconds[name] for name in by_plan)
    assert (tmp_path / "tuned.svg").exists()


def test_the_faster_half_is_run_for_twice_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    monkeypatch.setattr(tune, "run_trial", stand)
    one = session(tmp_path / "tuned.toml", top=5)
    one.run(vary=False)
    steps = [steps for _, steps in stand.tried]
    assert steps == [3] * 5 + [6] * 3 + [12] * 2
    order = sorted(dict(stand.tried[:5]), key=lambda name: true_seconds(stand.pool.of(Layout.parse(name)).time))
    assert {name for name, steps in stand.tried if steps == 12} == set(order[:2])
    assert one.table.winner is not None
    assert one.table.winner.layout == order[0]
    assert one.table.winner.num_steps == 12


def test_what_fails_later_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(config: Config, steps: int) -> Result:
        if steps > 3 and str(config.layout) == stand.tried[0][0]:
            return Result(failed="out of memory")
        return Result(1.0 + len(stand.tried), (1.0,) * steps, 1)

    stand = Stand(told)
    monkeypatch.setattr(tune, "run_trial", stand)
    one = session(tmp_path / "tuned.toml", top=3)
    one.run(vary=False)
    assert one.table.winner is not None
    assert one.table.winner.layout == stand.tried[1][0]
    assert one.table.rows[0].result == Result(failed="out of memory")


def test_the_winner_is_varied_and_what_helps_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(config: Config, steps: int) -> Result:
        size = config.layout.micro_batch_size(8)
        bucket = abs(config.train.bucket_mib - 128) / 1000
        seconds = 8.0 - 2.0 * config.layout.dp - config.layout.compile - 1 / size + bucket
        return Result(seconds, (seconds,) * steps, 1)

    stand = Stand(told)
    monkeypatch.setattr(tune, "run_trial", stand)
    one = session(tmp_path / "tuned.toml", top=1, layout="dp2.mb2")
    one.run(vary=True)
    winner = one.table.winner
    assert winner is not None
    assert winner.name == "dp2.mb1.compile bucket_mib=128"
    assert winner.change == "of dp2.mb1.compile"
    assert not [name for name, _ in stand.tried if "attention" in name]  # on a CPU there is one kernel
    assert len({row.name for row in one.table.rows}) == len(stand.tried)
    tune.write_winner(settings(), one.table, tmp_path / "tuned.toml")
    written = load_config([tmp_path / "tuned.toml"])
    assert (str(written.layout), written.train.bucket_mib) == ("dp2.mb1.compile", 128)
    stand.tried.clear()
    again = session(tmp_path / "tuned.toml", TuneTable.read(tmp_path / "tuned.json", "this"), 1, "dp2.mb2")
    again.run(vary=True)
    assert not stand.tried
    assert again.table == one.table


def test_only_what_is_not_known_is_tried_and_a_break_loses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def until(config: Config, steps: int) -> Result:
        if len(stand.tried) > breaks:
            raise KeyboardInterrupt
        seconds = true_seconds(stand.pool.of(config.layout).time)
        return Result(seconds, (seconds,) * steps, 2**28)

    breaks, stand = 99, Stand(until)
    monkeypatch.setattr(tune, "run_trial", stand)
    whole = session(tmp_path / "whole.toml")
    whole.run(vary=True)
    everything = list(stand.tried)
    for breaks in range(1, len(everything)):
        stand.tried.clear()
        out = tmp_path / f"tuned{breaks}.toml"
        with pytest.raises(KeyboardInterrupt):
            session(out).run(vary=True)
        kept = TuneTable.read(tune.table_file(out), "this")
        done, stand.tried, last = stand.tried[:-1], [], breaks
        breaks = 99
        one = session(out, kept)
        one.run(vary=True)
        breaks = last
        assert done + stand.tried == everything
        assert one.table == whole.table
    winner = tune.write_winner(settings(), whole.table, out)
    written = load_config([out])
    assert str(written.layout) == winner.layout
    assert written.train == settings(seq=64).train


def test_a_table_is_planned_anew_where_the_cluster_was_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_trial", Stand())
    first = session(tmp_path / "tuned.toml", layout="dp2.mb2")
    first.run(vary=True)
    table = TuneTable.read(tmp_path / "tuned.json", "this")
    assert tune.planned_anew(table, pool("dp2.mb2", BUSY)) == table
    later = pool("dp2.mb2", 2 * BUSY)
    renewed = tune.planned_anew(table, later)
    assert [(row.name, row.results, row.change) for row in renewed.rows] == [
        (row.name, row.results, row.change) for row in table.rows
    ]
    assert [row.predicted_seconds for row in renewed.rows] == [
        later.of(Layout.parse(row.layout)).seconds for row in table.rows
    ]
    assert [row.predicted_seconds for row in renewed.rows] != [row.predicted_seconds for row in table.rows]
    assert renewed.rows[0].expected_seconds == renewed.rows[0].predicted_seconds  # nothing was known before it
    assert renewed.rows[1].expected_seconds != table.rows[1].expected_seconds


def test_without_a_single_measurement_nothing_is_written(tmp_path: Path) -> None:
    table = planned()
    for row in table.rows:
        table = table.with_row(measured(row, Result(failed="out of memory")))
    with pytest.raises(ValueError, match=r"no layout was measured, so there is no config to write: .*out of memory"):
        tune.write_winner(settings(), table, tmp_path / "tuned.toml")
    assert not (tmp_path / "tuned.toml").exists()


def test_a_trial_has_the_runs_settings_and_data_of_its_own(tmp_path: Path) -> None:
    config = settings("tp2", eval_every=5)
    tried = trial_config(config, 4, tmp_path / "trials" / "tokens")
    assert str(tried.layout) == "tp2"
    assert tried.train.steps == WARM_UP + 4
    assert tried.train.eval_every == 0
    assert (tried.model, tried.optimizer) == (config.model, config.optimizer)
    assert Path(tried.data.paths[0]).with_suffix(".idx").exists()


@pytest.mark.parametrize(
    ("program", "limit", "said"),
    [
        ("import time; time.sleep(60)", 0.3, "not done after 0 s: see --limit"),
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


def test_torchrun_says_why_a_trial_failed(tmp_path: Path) -> None:
    """Of two processes, as torchrun leaves it: what went wrong, and a page about that."""
    output = tmp_path / "output.txt"
    output.write_text(
        '[rank1]: Traceback (most recent call last):\n[rank1]:   File "trial.py", line 1, in main\n'
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "============================================================\nRoot Cause (first observed failure):\n"
        "  exitcode  : 1 (pid: 23)\n============================================================\n"
    )
    assert trial._reason(output, 1) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_kernels_of_attention_are_tried_on_a_gpu() -> None:
    assert [it["train"]["attention"] for it in variants.kernels(settings(), "cuda")] == ["flash", "cudnn", "efficient"]
    assert list(variants.kernels(settings(), "cpu")) == []
    assert list(variants.overlapped(settings("tp2.sp"), "cpu")) == [{"layout": {"async_tp": True}}]
    assert list(variants.buckets(settings("fsdp2"), "cpu")) == []


# -- Slurm ------------------------------------------------------------------------------------------------------------


def test_an_allocation_of_several_nodes_runs_torchrun_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "scontrol", 'test "$1 $2 $3" = "show hostnames gpu[7-8]" && printf "gpu7\\ngpu8\\n"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41002", "SLURM_JOB_NODELIST": "gpu[7-8]"}
    command = " ".join(slurm.srun(16, "weft.tune.trial:main", ["a", "3", "b"], env))
    assert command.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 ")
    assert "--nnodes=2 --nproc-per-node=8 " in command
    assert "--rdzv-endpoint=gpu7:29502 " in command
    assert command.endswith("-m weft.launch.worker weft.tune.trial:main a 3 b")
    with pytest.raises(ValueError, match="15 processes do not go evenly over the 2 nodes"):
        slurm.srun(15, "weft.tune.trial:main", [], env)
    assert slurm.num_nodes({}) == 1


def program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


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
    table = planned().with_row(measured(planned().rows[0], Result(1.5, (1.0, 1.5, 2.0), 2**30)))
    table.write(tmp_path / "table.json")
    tree = json.loads((tmp_path / "table.json").read_text())
    assert tree["rows"][0]["results"] == [{"seconds": 1.5, "steps": [1.0, 1.5, 2.0], "memory": 2**30, "failed": ""}]


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
    assert text.count("layout 2 of 3") == 1
    assert "the same command goes on from there" in text
    assert not out.exists()


def test_the_command_shows_what_was_measured_beside_the_plan_of_today(tmp_path: Path) -> None:
    config, out = settings("dp2"), tmp_path / "tuned.toml"
    (tmp_path / "run.toml").write_text(config_toml(config))
    before = Candidates(config, MEASURED, "cpu")
    row = Row.of(before.of(config.layout), 1.0)
    TuneTable(digest(config, 5, 2), (measured(row, Result(1.5, (1.5,), 2**28)),)).write(out.with_suffix(".json"))
    write_cluster(cluster(round_machine(compute_scale=2.0)), tmp_path / "here.toml")
    arguments = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--top", "1", "--dry-run"])
    line = next(line.split() for line in done.output.splitlines() if line.startswith("  dp2 "))
    assert line[5] == "1.5"
    assert float(line[1]) > 1.5 * row.predicted_seconds


def test_data_that_cannot_be_trained_on_are_refused_before_the_first_trial(tmp_path: Path) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    config = make_config({**settings().model_dump(), "data": {"paths": [str(tmp_path / "missing")]}})
    (tmp_path / "run.toml").write_text(config_toml(config))
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml")])
    assert "missing.bin does not exist" in str(done.exception)


@pytest.mark.parametrize(
    ("breaks", "said"), [(0, "stopped before anything was measured"), (1, "what was measured is in")]
)
def test_a_break_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: int, said: str) -> None:
    def until(config: Config, steps: int) -> Result:
        if len(stand.tried) > breaks:
            raise KeyboardInterrupt
        return Result(1.0, (1.0,) * steps, 2**28)

    stand = Stand(until)
    monkeypatch.setattr(tune, "run_trial", stand)
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings("dp2")))
    out = tmp_path / "tuned.toml"
    command = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130, done.output
    assert said in done.output
    assert tune.table_file(out).exists() == (breaks > 0)


def test_trials_of_another_run_are_kept_and_spoken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were written over without a word: hours of a cluster, perhaps."""
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings()))
    monkeypatch.setattr(tune, "run_trial", lambda *_: Result(1.5, (1.5,), 2**28))
    out = tmp_path / "tuned.toml"
    command = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--out", str(out)]
    command += ["--top", "1", "--no-vary"]
    assert "kept" not in CliRunner().invoke(app, command).output
    first = (tmp_path / "tuned.json").read_text()
    assert "kept" not in CliRunner().invoke(app, command).output
    assert "kept" not in CliRunner().invoke(app, [*command, "--batch", "16", "--dry-run"]).output
    assert list(tmp_path.glob("tuned*.json")) == [tmp_path / "tuned.json"]
    other = CliRunner().invoke(app, [*command, "--batch", "16"])
    assert other.exit_code == 0, other.output
    said = f"tuned.json is of another model, batch, data, number of processes or --steps: it is kept as {tmp_path}"
    assert said in other.stderr
    second = (tmp_path / "tuned.json").read_text()
    assert [file.read_text() for file in tmp_path.glob("tuned.*.json")] == [first]
    back = CliRunner().invoke(app, command)
    assert back.exit_code == 0, back.output
    assert (tmp_path / "tuned.json").read_text() == first
    assert [file.read_text() for file in tmp_path.glob("tuned.*.json")] == [second]


def test_gpus_are_not_tuned_for_on_a_cpu(tmp_path: Path) -> None:
    """Eight processes on a laptop's two cores took minutes, and were held against a plan of eight H100s."""
    (tmp_path / "run.toml").write_text(config_toml(settings(device="cpu")))
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "run.toml"), "--cluster", "h100x8"])
    assert isinstance(done.exception, ValueError)
    assert "--cluster h100x8 is of GPUs, and trials would run on the CPU" in str(done.exception)


def test_a_layout_of_another_number_of_processes_is_spoken_of(tmp_path: Path) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings()))
    command = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml"), "--dry-run", "--layout"]
    assert (
        "fsdp4 takes 4 processes and the cluster has 2: it is not among"
        in CliRunner().invoke(app, [*command, "fsdp4"]).stderr
    )
    assert "not among" not in CliRunner().invoke(app, [*command, "fsdp2"]).stderr


def test_what_cannot_begin_puts_nothing_aside(tmp_path: Path) -> None:
    write_cluster(MEASURED, tmp_path / "here.toml")
    (tmp_path / "run.toml").write_text(config_toml(settings()))
    TuneTable("another").write(tmp_path / "tuned.json")
    command = ["tune", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "here.toml")]
    command += ["--out", str(tmp_path / "tuned.toml"), "--data", str(tmp_path / "none")]
    assert "does not exist" in str(CliRunner().invoke(app, command).exception)
    assert (tmp_path / "tuned.json").exists()
