"""Requests, ranges and clocks: what happens in a run that is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import profile as torch_profile

from weft.cli.train import wanted
from weft.config.layout import Layout
from weft.config.load import make_config
from weft.profile import request
from weft.profile.ranges import Ranges, Wrap
from weft.profile.request import Request, leave, parse_ranks, parse_steps


@pytest.mark.parametrize(("text", "expected"), [("3", (0, 3)), ("10:13", (10, 3)), ("1:2", (1, 1))])
def test_steps_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_steps(text) == expected


@pytest.mark.parametrize("text", ["", "0", "13:10", "5:5", "a", "1:2:3", "-1"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a number of steps, or 10:13 for steps 10, 11 and 12"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("dp2.tp2", (0, 1, 2, 3)),  # few: all
        ("dp8.tp2", (0, 1)),  # of many the first replica
        ("dp4.tp2.pp2", (0, 1, 8, 9)),  # whose stages are far apart
        ("dp2.tp8.pp4", (0, 4, 16, 20, 32, 36, 48, 52)),  # of a large replica some of each stage
    ],
)
def test_ranks_by_default(layout: str, expected: tuple[int, ...]) -> None:
    assert parse_ranks(None, Layout.parse(layout)) == expected


def test_ranks_by_name() -> None:
    layout = Layout.parse("dp4")
    assert parse_ranks("3,1", layout) == (1, 3)
    assert parse_ranks("all", layout) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="ranks 4: layout dp4 has ranks 0 to 3"):
        parse_ranks("4", layout)
    with pytest.raises(ValueError, match="write numbers with commas between"):
        parse_ranks("one", layout)


def test_a_request_is_taken_once(tmp_path: Path) -> None:
    Request(10, 3, (0, 1)).write(tmp_path)
    assert Request.waiting(tmp_path)
    assert Request.take(tmp_path) == Request(10, 3, (0, 1))
    assert not Request.waiting(tmp_path)


def test_a_damaged_request_is_named_and_gone(tmp_path: Path) -> None:
    Request(10, 3, (0,)).write(tmp_path)
    (tmp_path / request.FOLDER / request.FILE).write_text('{"first": ')
    with pytest.raises(ValueError, match="is no request for a trace"):
        Request.take(tmp_path)
    assert not Request.waiting(tmp_path)


def test_a_new_run_is_not_asked_what_an_old_one_was(tmp_path: Path) -> None:
    Request(10, 3, (0,)).write(tmp_path)
    leave(None, tmp_path)
    assert not Request.waiting(tmp_path)
    leave(None, tmp_path / "new")  # where there is no folder yet


def test_steps_beyond_the_end_are_refused() -> None:
    config = make_config({"model": {"preset": "gpt2-124m"}, "train": {"steps": 12}})
    assert wanted(config, "10:13", None) == Request(10, 3, (0,))
    with pytest.raises(ValueError, match=r"--profile 11:14: the run ends with step 12: raise train\.steps"):
        wanted(config, "11:14", None)
    with pytest.raises(ValueError, match="--profile-ranks 0: of which steps"):
        wanted(config, None, "0")


# -- ranges -----------------------------------------------------------------------------------------------------------


class Work:
    def double(self, x: float) -> float:
        return 2 * x


def test_ranges_are_there_while_they_are_wanted_and_gone_after() -> None:
    linear, work = nn.Linear(2, 2), Work()
    ranges = Ranges({"head": linear}, [Wrap(work, "double", "optimizer"), Wrap(Work, "double", lambda _, x: f"op:{x}")])
    before = Work.double

    def names() -> list[str]:
        with torch_profile(acc_events=True) as found:
            linear(torch.ones(1, 2))
            assert (work.double(3), Work().double(4)) == (6, 8)
        return [it.name for it in found.events() if it.name.startswith("weft:")]

    assert names() == []
    ranges.begin()
    # work's own wrapper came first, so it is outside of nobody's: an object's method goes over its class's
    assert sorted(names()) == ["weft:module:head", "weft:op:4", "weft:optimizer"]
    ranges.end()
    assert names() == []
    assert Work.double is before
    assert vars(work) == {}
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks


def test_a_module_that_fails_closes_its_range() -> None:
    module = nn.Linear(2, 2)
    ranges = Ranges({"head": module}, [])
    ranges.begin()
    with torch_profile(acc_events=True) as found:
        for rows in (3, 2):
            try:
                module(torch.ones(1, rows))
            except RuntimeError:
                assert rows == 3
    ranges.end()
    ends = [it.time_range.end for it in found.events() if it.name == "weft:module:head"]
    assert len(ends) == 2
