"""Schedules as tables: every one that can be made is whole and ends; waiting and activations are as published."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weft.schedules.check import check
from weft.schedules.formula import published_bubble
from weft.schedules.orders import ORDERS, make_schedule, refusal
from weft.schedules.sheet import read_sheet, write_sheet
from weft.schedules.table import Op, Schedule, peaks
from weft.schedules.timeline import Costs, timeline


@given(st.sampled_from(sorted(ORDERS)), st.integers(2, 6), st.integers(1, 3), st.integers(1, 20))
def test_every_schedule_is_whole_and_ends(name: str, ranks: int, chunks: int, count: int) -> None:
    assume(refusal(name, ranks, chunks, count) is None)
    schedule = make_schedule(name, ranks, chunks, count)
    assert check(schedule) is schedule
    assert sum(op.kind == "F" for order in schedule.orders for op in order) == ranks * chunks * count


@pytest.mark.parametrize(
    ("name", "chunks", "waiting", "most"),
    [
        ("gpipe", 1, 9, [12, 12, 12, 12]),  # (p - 1)(F + B + W)
        ("1f1b", 1, 9, [4, 3, 2, 1]),
        ("interleaved", 2, 9, [11, 9, 7, 5]),  # of stages half as long
        ("bfs", 2, 9, [24, 24, 24, 24]),
        ("zbh1", 1, 3, [4, 4, 4, 4]),  # (p - 1)(F + B - W)
        ("zbv", 2, 3, [8, 8, 8, 8]),
        ("dualpipev", 2, 3, [9, 9, 9, 9]),
    ],
)
def test_waiting_and_activations_as_published(name: str, chunks: int, waiting: int, most: list[int]) -> None:
    schedule = make_schedule(name, 4, chunks, 12)
    assert timeline(schedule, Costs()).length - 3 * 12 * chunks == waiting
    assert peaks(schedule) == most


@given(
    st.sampled_from(sorted(ORDERS)), st.integers(2, 8), st.integers(1, 3), st.integers(2, 4), st.integers(1, 5),
    st.integers(1, 5), st.integers(1, 5),
)  # fmt: skip
def test_tables_wait_as_formulas_say(
    name: str, ranks: int, chunks: int, rounds: int, forward: int, backward: int, weights: int
) -> None:
    assume(refusal(name, ranks, chunks, rounds * ranks) is None)
    costs = Costs(forward, backward, weights)
    formula = published_bubble(name, ranks, chunks, rounds * ranks, costs)
    assume(formula is not None)
    schedule = make_schedule(name, ranks, chunks, rounds * ranks)
    assert timeline(schedule, costs).bubble == pytest.approx(formula)


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipev"])
def test_a_sheet_says_the_same(name: str, tmp_path: Path) -> None:
    schedule = make_schedule(name, 2, 1 if name == "1f1b" else 2, 6)
    write_sheet(schedule, tmp_path / "own.csv")
    assert read_sheet(str(tmp_path / "own.csv")).orders == schedule.orders


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0B0\n1F0,1X0\n", "line 2, column 2: '1X0' is no operation"),
        ("0F0,0B0\n1F0\n", "B of stage 1, micro-batch 0 is missing"),
        ("0F0,0B0,0B0\n1F0,1B0\n", "B of stage 0, micro-batch 0 is there 2 times"),
        ("0F0,0I0\n1F0,1B0\n", "line 1, column 2: 0I0 leaves out the weights"),
        ("0F0,0B0,1F0\n1B0\n", "stage 1 is on processes 0 and 1"),
        ("0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1\n", "forwards out of order"),
        ("0F0,0B0\n1B0,1F0\n", "never ends: process 0 at B of stage 0.* waits for B of stage 1"),
        ("\n", "holds no operation"),
    ],
)
def test_what_is_no_schedule(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_sheet(str(tmp_path / "own.csv"))


def test_a_process_with_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="process 1 has nothing to do"):
        check(Schedule("own", ((Op("F", 0, 0), Op("B", 0, 0)), ())))
