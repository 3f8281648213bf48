"""Traces that others recorded on GPUs: tests/data/cuda-traces says whose."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_profile_report import text_of

from weft.profile.advice import advise
from weft.profile.diff import show_diff
from weft.profile.load import Profile, load
from weft.profile.roofline import operations

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


def test_a_step_of_training_waits_for_its_host(tmp_path: Path) -> None:
    """Numbers are sums over the file's events: the step's range; the union of kernels, copies and fills within it; the
    kernels whose names hold sdpa or cudnn, triton, nvjet."""
    profile = recorded("training", tmp_path)
    kinds = {kind: 1e3 * seconds for kind, seconds in profile.kinds.items()}
    assert sum(kinds.values()) == pytest.approx(93.769142)
    assert kinds["host"] + kinds["data wait"] == pytest.approx(93.769142 - 11.074822, rel=1e-3)
    assert kinds["attention"] == pytest.approx(1.1948, rel=0.02)  # a few fills belong to it
    assert kinds["compiled"] == pytest.approx(1.4256, rel=1e-3)
    assert kinds["gemm"] == pytest.approx(4.1634, rel=0.05)  # some overlap the kernel before
    assert {f"blocks.{index}" for index in range(8)} <= {part for part, *_ in profile.parts}
    first, *_ = advise(profile)
    assert first.change == "layout.compile = true, or larger micro-batches"  # the trace alone tells no settings
    assert first.share == pytest.approx(kinds["host"] / 93.769142)
    assert "it launches 1,458 kernels a step, of 8 µs in the mean" in first.evidence


def test_products_of_a_step_of_training_are_those_of_its_sizes(tmp_path: Path) -> None:
    """Gates and ups of 8 blocks, and the downs' gradients: 8192 × 768 by 768 × 2048."""
    [rank] = recorded("training", tmp_path).ranks
    found = {(it.name, it.dims): it for it in operations(rank.breakdown)}
    one = found["mm", "8192×768 · 768×2048 · 8192×2048"]
    assert one.count == 24
    assert one.flops == 2 * 8192 * 768 * 2048
