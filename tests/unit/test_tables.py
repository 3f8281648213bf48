"""Tables on terminals of any width: whatever it is, nothing of them is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from weft.cli.app import app
from weft.plan.advice import Answer
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.search import search
from weft.plan.show.findings import show_answers, show_plan, show_search
from weft.presets import preset_names, preset_shape
from weft.tables import print_table
from weft.units import gibibytes


def printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(table, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def a_table() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("name", overflow="fold")
    for name in ("one", "two"):
        table.add_column(name, justify="right")
    table.add_row("fsdp16.tp4", "1.5 s", "61.4 GiB", style="bold")
    table.add_row("[dim]pp2[/]", "12 s", "no room:\n3 GiB")
    return table


def test_where_there_is_room_a_table_is_a_table() -> None:
    lines = printed(a_table(), 60)
    assert lines[0].split() == ["name", "one", "two"]
    assert lines[1].split() == ["fsdp16.tp4", "1.5", "s", "61.4", "GiB"]


@pytest.mark.parametrize("width", [10, 24])
def test_where_there_is_none_a_row_is_two_lines_and_no_cell_is_cut(width: int) -> None:
    lines = printed(a_table(), width)
    assert [line.split() for line in lines] == [
        ["one", "two"], ["fsdp16.tp4"], ["1.5", "s", "61.4", "GiB"], ["pp2"], ["12", "s", "no", "room:", "3", "GiB"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[2::2]}) == 1  # to the right, one under another


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_plan_is_whole_on_any_terminal(width: int) -> None:
    found = search(preset_shape("llama3-70b"), Job(seq=8192, global_batch=1024), read_cluster("h100x512"))
    plans = found.best(3)
    console = Console(file=io.StringIO(), width=width)
    show_search(found, plans, console)
    show_answers([Answer("what", "that", plans[0].layout)], console)
    show_plan(plans[0], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text.replace("why not …", "")
    for plan in plans:
        assert str(plan.layout) in text
        assert f" {gibibytes(plan.bytes)} " in text


def test_presets_are_listed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "dumb"), ("COLUMNS", "80")):  # a terminal, without colours
        monkeypatch.setenv(name, value)
    lines = CliRunner().invoke(app, ["models"]).output.splitlines()
    assert "…" not in "".join(lines)
    assert set(preset_names()) <= {line.strip() for line in lines}
