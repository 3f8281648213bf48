"""Traces that others recorded on GPUs: tests/data/cuda-traces says whose."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_profile_report import text_of

from weft.profile.diff import show_diff
from weft.profile.load import Profile, load

TRACES = Path(__file__).parents[1] / "data" / "cuda-traces"


def recorded(name: str, folder: Path) -> Profile:
    shutil.copy(TRACES / f"{name}.trace.json.gz", folder)
    return load(folder)


def test_gradients_of_resnet_50_are_all_reduced_over_two_gpus(tmp_path: Path) -> None:
    profile = recorded("data-parallel", tmp_path)
    [rank] = profile.ranks
    traffic = {it.kind: it for it in rank.traffic}
    assert traffic["all_reduce"].bytes == 4 * 25_557_032  # its parameters (He et al., 2015), each of four bytes
    assert traffic["all_reduce"].count == 5  # of DDP's buckets
    assert traffic["all_reduce"].exposed < traffic["all_reduce"].seconds
    assert sum(profile.kinds.values()) == pytest.approx(profile.seconds, rel=1e-9)
    convolutions = [it for it in rank.trace.kernels if "dgrad" in it.name or "convolve" in it.name]
    assert len(convolutions) == 24
    assert {it.mark.kind for it in convolutions} == {"gemm"}
    assert profile.kinds["gemm"] > profile.kinds["norm"] > 0


def test_an_all_to_all_is_told_from_send_and_receive_whose_kernel_it_has(tmp_path: Path) -> None:
    profile = recorded("all-to-all", tmp_path)
    [rank] = profile.ranks
    assert {it.kind: it.count for it in rank.traffic} == {"all_to_all": 2, "all_reduce": 2, "all_gather": 1}
    assert all("SendRecv" in it.name for it in rank.trace.kernels if it.mark.message == "all_to_all")
    assert "bubble" not in profile.kinds
    assert profile.kinds["embedding"] > 0


def test_what_a_trace_does_not_tell_is_left_out(tmp_path: Path) -> None:
    text = text_of(recorded("all-to-all", tmp_path))
    assert "all_to_all      2     –" in text  # bytes, which its records do not have
    assert "0B/s" not in text
    assert "by part of the model" not in text  # no range names one


def test_a_difference_of_traces_without_parts_shows_none(tmp_path: Path) -> None:
    one = recorded("data-parallel", tmp_path)
    console = Console(record=True, width=120, file=StringIO())
    show_diff(one, one, console)
    text = console.export_text()
    assert "kind of work" in text
    assert "part:" not in text
