"""`weft plan schedule`: what it draws, counts and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.plan.schedules import ScheduleReport, named, of_model
from weft.schedules.orders import ORDERS
from weft.schedules.sheet import read_sheet
from weft.schedules.terminal import draw
from weft.schedules.timeline import Costs


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", "schedule", *arguments], env={"COLUMNS": "80"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_one_is_drawn_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # short names: lines are counted
    svg, csv = Path("zbv.svg"), Path("zbv.csv")
    shown = run("zbv", "--pp", "2", "--micro-batches", "4", "--svg", str(svg), "--csv", str(csv))
    assert "process 0 F0 F1 F2 f0 b0 w0" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert read_sheet(str(csv)).orders == named("zbv", 2, 2, 4).orders
    picture = ElementTree.fromstring(svg.read_text())
    cells = list(picture.iter("{http://www.w3.org/2000/svg}title"))
    assert len(cells) == 1 + 2 * 2 * 4 * 3  # the picture's own, and each operation's
    assert "zbv.csv" in run(str(csv), "--compare")


def test_all_are_compared() -> None:
    shown = run("--pp", "4", "--micro-batches", "6")
    for name in ORDERS:
        assert name in shown
    assert "6 are no whole rounds" in " ".join(shown.split())
    assert "GiB" in run("1f1b", "zbv", "--model", "llama3-8b", "--layout", "tp2.bf16")
    assert "GiB" not in run("1f1b", "--model", "llama3-8b", "--layout", "tp2.bf16.fit40g"), "the budget decides"


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_drawing_keeps_its_width(name: str, width: int, colour: bool) -> None:
    report = ScheduleReport(named(name, 4, 2, 12), Costs(1, 1.3, 0.9))
    lanes = draw(report.schedule, report.line, width, colour)
    assert max(len(lane) for lane in lanes) <= width
    assert len(lanes) <= 5 * 5
    for rank in range(4):
        letters = "".join(lane.plain for lane in lanes if lane.plain.startswith(f"process {rank}"))
        assert letters.count("F") + letters.count("f") == report.schedule.num_chunks * 12


def test_a_models_stages_take_what_they_multiply() -> None:
    """Of equal blocks: the last has the head too; attention's backward has no weights."""
    report = of_model(named("zbh1", 4, 2, 8), "llama3-8b", Layout.parse("bf16"), 4096)
    assert isinstance(report.costs, tuple)
    assert report.config is not None
    blocks = [len(part) for part in report.config.layout.stage_blocks(report.config.model)]
    each = [cost.forward / size for cost, size in zip(report.costs, blocks, strict=True)]
    assert each[0] == pytest.approx(each[1])
    assert each[3] > each[0]
    assert all(cost.weights < cost.forward < cost.input for cost in report.costs)
    assert report.published is None
    assert report.activations is not None
    assert report.activations[0] > report.activations[3] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["zbx"], "zbx is no schedule: name one of gpipe, 1f1b"),
        (["none.csv"], "none.csv"),
        (["zbv", "--costs", "1:2"], "write three numbers"),
        (["zbv", "--costs", "1:0:1"], "every operation takes some time"),
        (["zbv", "--costs", "1:2:nan"], "every operation takes some time"),
        (
            ["--compare", "--pp", "2", "--model", "gpt2-124m", "--seq", "1024", "--layout", "tp5"],
            "^layout.tp = 5 does not divide model.num_heads = 12$",
        ),
        (["zbv", "gpipe", "--svg", "x.svg"], "--svg and --csv are for one schedule"),
        (["--pp", "1024"], "tables are worked out up to 131,072 of one on a process, and this has 2,097,152"),
        (["zbv", "--layout", "tp2"], "name one with --model"),
        (["zbv", "--model", "gpt2-124m", "--layout", "pp2", "--seq", "1024"], "say the pipeline by --pp"),
        (["zbv", "--pp", "16", "--model", "gpt2-124m", "--seq", "1024"], "need as many blocks"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


def test_loads_without_torch() -> None:
    code = (
        "import sys; from weft.cli import app\n"
        "try: app.app(['plan', 'schedule', 'zbv'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_stages_that_a_schedule_does_not_have_are_not_asked_in_vain() -> None:
    done = CliRunner().invoke(app, ["plan", "schedule", "zbv", "--pp", "4", "--vp", "3"])
    assert "--vp 3 is of interleaved and bfs: leave it out" in str(done.exception)
    assert "12 stages" in run("interleaved", "--pp", "4", "--vp", "3")
    assert "8 stages" in run("interleaved", "--pp", "4")
