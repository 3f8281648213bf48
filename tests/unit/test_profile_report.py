"""Memory, roofline, advice, report, page, merged trace and comparison: of synthetic CUDA traces. Without torch."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from profile_traces import MAIN, cuda_step, op, range_, write
from rich.console import Console
from typer.testing import CliRunner

from weft.cli.app import app
from weft.profile.advice import advise
from weft.profile.attribution import Attribution
from weft.profile.diff import changes, compared
from weft.profile.load import Profile, load
from weft.profile.memory import memory_of
from weft.profile.merge import write_merged
from weft.profile.report import milliseconds, most_exposed, show
from weft.profile.roofline import device_of, dims_of, flops, moved, operations
from weft.profile.summary import by_part, stragglers
from weft.profile.trace import Event, Trace

CONFIG = {
    "model": {"preset": "llama3-8b"},
    "layout": "fsdp2.pp2.bf16.mb1",
    "train": {"global_batch": 8, "seq": 8192},
}


def capture(
    folder: Path,
    slower: tuple[float, ...] = (1.0, 1.0),
    settings: dict = CONFIG,
    **about: object,
) -> Path:
    """What `weft train --profile` would have left, on ranks 0 and up."""
    from weft.config.load import make_config

    config = make_config(settings).model_dump(mode="json")
    for rank, factor in enumerate(slower):
        write(folder / f"rank{rank}.trace.json.gz", cuda_step(factor))
        facts = {"rank": rank, "clock_ahead_ns": 5_000 * rank, "clock_error_ns": 2_000, "held": {"weights": 3000}}
        (folder / f"rank{rank}.json").write_text(json.dumps(facts))
    values = {
        "steps": [7], "ranks": list(range(len(slower))), "config": config, "layout": settings["layout"],
        "device": "NVIDIA H100",
        "peak_flops": 989e12, "peak_source": "datasheet", "bytes_per_s": 3.3e12, "memory": 80 * 2**30,
        "groups": {"3": "fsdp", "9": "pp"}, **about,
    }  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return load(capture(tmp_path / "profile" / "step-00000007", (1.0, 2.0)))


def text_of(profile: Profile, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show(profile, console)
    return console.export_text()


# -- finding ----------------------------------------------------------------------------------------------------------


def test_the_newest_whole_capture_of_a_run_is_found(tmp_path: Path) -> None:
    capture(tmp_path / "profile" / "step-00000007")
    newest = capture(tmp_path / "profile" / "step-00000021")
    half = capture(tmp_path / "profile" / "step-00000030")
    (half / "profile.json").unlink()  # it is being written
    assert load(tmp_path).folder == newest


def test_foreign_traces_are_read_too(tmp_path: Path) -> None:
    steps = [{**it, "name": "ProfilerStep#7"} if it["name"] == "weft:step:7" else it for it in cuda_step()]
    write(tmp_path / "worker0.pt.trace.json", [it for it in steps if not it["name"].startswith("weft:")])
    found = load(tmp_path)
    assert (found.steps, found.config, found.mfu(causal=True)) == ([7], None, None)
    assert found.kinds["gemm"] == pytest.approx(300e-6)
    device = device_of(found)
    assert device is not None
    assert (device.name, round(device.flops / 1e12), device.source) == ("NVIDIA H100 80GB HBM3", 989, "datasheet, h100")


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no traces: take some with `weft train … --profile 3`"):
        load(tmp_path)


def test_what_is_no_folder_is_told_as_that(tmp_path: Path) -> None:
    folder = capture(tmp_path / "profile" / "step-00000007")
    with pytest.raises(ValueError, match=r"rank0.trace.json.gz is a file: name the folder that it lies in"):
        load(folder / "rank0.trace.json.gz")
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        load(tmp_path / "none")
    for written, told in ((b"[]", "it holds no table"), (b"{", "Expecting"), (b"\xff{}", "'utf-8' codec")):
        (folder / "profile.json").write_bytes(written)
        with pytest.raises(ValueError, match=rf"profile.json is damaged: {told}"):
            load(folder)


def test_a_rank_whose_trace_is_not_there_is_told(tmp_path: Path) -> None:
    folder = capture(tmp_path / "profile" / "step-00000007")
    assert "step 7 on 2 ranks, " in text_of(load(folder))
    (folder / "rank1.trace.json.gz").unlink()
    assert "step 7 on 1 of 2 traced ranks, " in text_of(load(folder))


def test_a_trace_without_a_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rank0.trace.json", [])
    with pytest.raises(ValueError, match="has no whole step"):
        load(tmp_path)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_kinds_and_parts_add_up_to_a_step(profile: Profile) -> None:
    for rank in profile.ranks:
        assert sum(rank.kinds.values()) == pytest.approx(rank.seconds, rel=1e-12)
        assert sum(rank.parts.values()) == pytest.approx(rank.seconds, rel=1e-12)
    assert sum(layer.seconds for layer in by_part(profile)) == pytest.approx(sum(profile.kinds.values()), rel=1e-12)


def test_mfu_is_of_all_processes(profile: Profile) -> None:
    config = profile.config
    assert config is not None
    tokens, devices = 8 * 8192, 4
    for causal in (True, False):
        expected = config.model.flops_per_token(8192, causal=causal) * tokens / (1e-3 * devices * 989e12)
        assert profile.mfu(causal=causal) == pytest.approx(expected)


def test_memory_is_held_by_those_who_asked_for_it() -> None:
    trace = Trace({"traceEvents": [*cuda_step(), range_("op:B:0:0", 400, 150)]})
    found = memory_of(Attribution(trace, {}), {"held": {"weights": 3000}})
    assert found is not None
    # 4,000 bytes before the trace, of which 3,000 were told of; at 435 µs all of the step's are there
    assert found.peak == 7500
    assert found.holders == {"weights": 3000, "other, from before": 1000, "activations": 3000, "gradients": 500}
    assert found.parts == {"blocks.0.mlp": 3000}
    assert found.peak == sum(found.holders.values())


def test_what_gloos_own_thread_gives_back_ends_with_its_message() -> None:
    """No profiler hears of it: in the last step and in one before it, whether or not the place is used again."""

    def asked(at: float, size: int, address: int) -> dict:
        args = {"Bytes": size, "Addr": address, "Device Type": 0}
        return {"name": "[memory]", "ph": "i", "ts": at, "tid": MAIN, "args": args}

    def message(at: float) -> list[dict]:
        gloo = op("gloo:all_reduce", at, 5, MAIN + 1, Input_Dims=[[16]], Input_type=["float"])
        asking = op("c10d::allreduce_", at - 1, 1, Input_Dims=[[[16]]], Input_type=["TensorList"])
        return [asking, {**gloo, "cat": "user_annotation"}]

    steps = [range_("step:1", 0, 100), range_("step:2", 100, 100)]
    lost = [asked(10, 64, 1), asked(110, 64, 1), asked(130, 64, 2), asked(20, 4096, 3)]
    again = [asked(160, 1000, 4), asked(180, -1000, 4)]
    trace = Trace({"traceEvents": [*steps, *message(12), *message(112), *message(132), *lost, *again]})
    found = memory_of(Attribution(trace, {}), {"held": {"weights": 100}})
    assert found is not None
    assert [(round(time * 1e6), size) for time, size in found.curve] == [
        (10, 164), (17, 100), (20, 4196), (110, 4260), (117, 4196), (130, 4260), (137, 4196), (160, 5196), (180, 4196),
    ]  # fmt: skip
    assert found.peak == 5196


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("aten::mm", [[8, 4], [4, 2]], 2 * 8 * 4 * 2),
        ("aten::addmm", [[2], [8, 4], [4, 2]], 2 * 8 * 4 * 2),
        ("aten::bmm", [[3, 8, 4], [3, 4, 2]], 2 * 3 * 8 * 4 * 2),
        ("aten::_scaled_dot_product_flash_attention", [[1, 2, 8, 4], [1, 2, 8, 4], [1, 2, 8, 4]], 2 * 2 * 8 * 8 * 8),
        ("aten::silu", [[8, 4]], 0),
    ],
)
def test_flops_follow_from_sizes(name: str, dims: list, expected: float) -> None:
    types = ["float"] * len(dims)
    assert flops(Event(name, "cpu_op", 0, 1, 0, {"Input Dims": dims, "Input type": types})) == expected


def test_a_causal_mask_halves_attention_and_backward_is_two_and_a_half() -> None:
    dims, causal = [[1, 2, 8, 4]] * 4, ["", "", "", "True"]
    forward = Event("aten::_scaled_dot_product_flash_attention", "cpu_op", 0, 1, 0, {"Input Dims": dims})
    backward = Event("aten::_scaled_dot_product_flash_attention_backward", "cpu_op", 0, 1, 0, {"Input Dims": dims})
    whole = flops(forward)
    forward.args["Concrete Inputs"] = causal
    assert flops(forward) == whole / 2
    assert flops(backward) == 2.5 * whole


def test_the_roof_of_an_operation(profile: Profile) -> None:
    device = device_of(profile)
    assert device is not None
    product = next(it for it in operations(profile.ranks[0].breakdown) if it.name == "mm")
    size = 2 * (1024 * 4096 + 4096 * 4096 + 1024 * 4096)
    assert (product.count, product.dims, product.bytes) == (2, "1024×4096 · 4096×4096", size)
    assert product.seconds == pytest.approx(300e-6)
    assert product.rate() == pytest.approx(2 * 2 * 1024 * 4096 * 4096 / 300e-6)
    assert product.bound(device) == "compute"
    assert product.reached(device) == pytest.approx(product.rate() / 989e12)
    silu = next(it for it in operations(profile.ranks[0].breakdown) if it.name == "silu")
    assert silu.bound(device) == "memory"
    assert silu.reached(device) == pytest.approx(2 * 2 * 1024 * 4096 / 50e-6 / 3.3e12)


def test_bytes_of_an_operation_in_place_are_not_counted_twice() -> None:
    args = {"Input Dims": [[8, 4], [8, 4]], "Input type": ["float", "float"]}
    assert moved(Event("aten::add_", "cpu_op", 0, 1, 0, args)) == 2 * 128
    assert moved(Event("aten::add", "cpu_op", 0, 1, 0, args)) == 3 * 128
    assert dims_of(Event("aten::add", "cpu_op", 0, 1, 0, args)) == "8×4 · 8×4"


@pytest.mark.parametrize(
    ("name", "factors"), [("mm", [[8, 4], [4, 2]]), ("addmm", [[2], [8, 4], [4, 2]]), ("bmm", [[3, 8, 4], [3, 4, 2]])]
)
def test_bytes_of_where_a_product_goes_are_not_counted_twice(name: str, factors: list[list[int]]) -> None:
    def bytes_of(dims: list[list[int]]) -> float:
        return moved(
            Event(f"aten::{name}", "cpu_op", 0, 1, 0, {"Input Dims": dims, "Input type": ["float"] * len(dims)})
        )

    into = [*factors[-2][:-1], factors[-1][-1]]
    assert bytes_of([*factors, into]) == bytes_of(factors) == 4 * sum(math.prod(shape) for shape in [*factors, into])


def test_a_straggler_is_named(profile: Profile) -> None:
    assert set(stragglers(profile)) == {1}
    assert "most in gemm" in stragglers(profile)[1]


# -- what is said -----------------------------------------------------------------------------------------------------


def test_advice_comes_with_its_evidence_largest_first(profile: Profile) -> None:
    found = advise(profile)
    assert [it.share for it in found] == sorted((it.share for it in found), reverse=True)
    by_change = {it.change: it for it in found}
    [host] = [it for it in found if it.change.startswith("layout.compile = true, or layout.micro_batch = ")]
    assert "kernels a step, of" in host.evidence
    assert "of 80 GiB (planner)" in host.evidence
    share = profile.kinds["host"] / sum(profile.kinds.values())
    assert host.gain == f"up to {100 * share:.1f} % of the step"
    assert "nothing runs on the GPU for" in host.evidence
    schedule = by_change["layout.schedule = zbv"]
    assert "of equal stages this order waits" in schedule.evidence
    assert any("look at rank 1's machine" in it.change for it in found)


def test_nothing_is_advised_that_weft_refuses(tmp_path: Path) -> None:
    """Experts whose block is computed again are not compiled."""
    changes = {}
    for layout in ("ep2.fsdp2.redo-experts", "ep2.fsdp2"):
        model = {"preset": "mixtral-8x7b", "num_layers": 4}
        settings = {"model": model, "layout": layout, "train": {"global_batch": 16, "seq": 1024}}
        found = advise(load(capture(tmp_path / layout / "profile" / "step-00000007", settings=settings)))
        changes[layout] = " ".join(it.change for it in found)
    assert "layout.compile" in changes["ep2.fsdp2"]
    assert "layout.compile" not in changes["ep2.fsdp2.redo-experts"]
    assert "micro" in changes["ep2.fsdp2.redo-experts"]


def test_memory_that_logits_hold_is_what_the_planner_says_a_chunked_loss_saves(tmp_path: Path) -> None:
    events = [*cuda_step(), range_("module:head", 205, 20)]
    settings = {
        "model": {"preset": "gpt2-124m"}, "layout": "fsdp2.bf16.mb8", "train": {"global_batch": 16, "seq": 1024}
    }  # fmt: skip
    folder = capture(tmp_path / "profile" / "step-00000007", settings=settings, memory=0)
    # a gigabyte of logits, asked for inside of the head
    logits = {
        "ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 4242, "tid": 4242, "ts": 210,
        "args": {"Total Allocated": 2**30, "Bytes": 2**30, "Device Id": 0, "Device Type": 1, "Addr": 99},
    }  # fmt: skip
    write(folder / "rank0.trace.json.gz", [*events, op("aten::mm", 206, 10), logits])
    found = next(it for it in advise(load(folder)) if it.change == "layout.loss = chunked")
    assert found.gain == "saves 542 MiB (planner)"
    assert "logits and loss take 100.0 % of the peak of 1.00 GiB on rank 0" in found.evidence


@pytest.mark.parametrize(("device", "precision"), [("NVIDIA H100", "bf16"), ("Tesla V100-SXM2-32GB", "fp16")])
def test_fewer_bits_are_those_that_the_card_has(device: str, precision: str, tmp_path: Path) -> None:
    settings = {"model": {"preset": "gpt2-124m"}, "layout": "fsdp2", "train": {"global_batch": 16, "seq": 1024}}
    folder = capture(tmp_path / "profile" / "step-00000007", settings=settings, device=device)
    assert f"layout.precision = {precision}" in [it.change for it in advise(load(folder))]


def test_the_report_says_all_of_it(profile: Profile) -> None:
    text = text_of(profile)
    for said in (
        "step 7 on 2 ranks", "fsdp2.pp2.bf16.mb1 on 4 × NVIDIA H100", "MFU", "matrix products", "fsdp exposed", "blocks.0",
        "largest operations, against NVIDIA H100: 989 TFLOP/s, 3.30 TB/s (datasheet)", "1024×4096 · 4096×4096",
        "memory of tensors, rank 0", "ranks side by side", "straggler", "what to change, largest gain first",
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_are_whole_on_any_terminal(profile: Profile, width: int) -> None:
    text = text_of(profile, width)
    assert "…" not in text
    lines = text.partition("where a step's time goes")[2].partition("messages of a step")[0].splitlines()
    assert max(map(len, lines)) <= width
    bars = {line[:12].strip(): line.count("█") for line in lines if "█" in line}
    assert set(bars) == set(profile.kinds)
    whole = bars["gemm"] / profile.kinds["gemm"]  # columns a second
    assert all(abs(bars[kind] - whole * seconds) <= 1.5 for kind, seconds in profile.kinds.items())


def test_messages_are_told_of_the_rank_where_their_axis_is_exposed_most(profile: Profile) -> None:
    """So that what a step says of an axis, the mean over ranks, is never more."""
    told = most_exposed(profile)
    assert list(told) == ["pp", "fsdp"]
    for axis, kind in (("pp", "bubble"), ("fsdp", "fsdp exposed")):
        assert told[axis].kinds[kind] == max(rank.kinds[kind] for rank in profile.ranks) >= profile.kinds[kind]
        its = [it.exposed for it in told[axis].traffic if it.axis == axis]
        assert sum(its) == pytest.approx(told[axis].kinds[kind], rel=1e-12)


def test_a_folders_name_is_no_markup(tmp_path: Path) -> None:
    folder = capture(tmp_path / "of [bold]mine" / "profile" / "step-00000007")
    assert f"{folder}: step 7 " in text_of(load(folder)).replace("\n", "")
    told = CliRunner().invoke(app, ["profile", "diff", str(folder), str(folder)]).output.replace("\n", "")
    assert told.count("of [bold]mine") == 2
    assert "a step takes as long as before: " in told


def test_an_operation_of_unknown_bytes_has_no_share_of_the_roof(tmp_path: Path) -> None:
    file = tmp_path / "rank0.trace.json.gz"
    write(file, [range_("step:7", 0, 1000), op("aten::_foreach_add_", 10, 500, Input_Dims=[[[], []], []])])
    about = {"device": "CPU", "peak_flops": 1e11, "bytes_per_s": 1e10, "peak_source": "measured"}
    profile = replace(load(file.parent), about=about)
    line = next(line for line in text_of(profile).splitlines() if line.startswith("_foreach_add_"))
    assert line.split()[1:] == ["1", "0.50", "ms"]


def test_changes_are_sorted_by_how_much_they_differ() -> None:
    from collections import Counter

    found = changes(Counter(a=5, b=2), Counter(a=1, c=3))
    assert [(it.name, it.more) for it in found] == [("a", -4), ("c", 3), ("b", -2)]


def test_two_profiles_are_compared(tmp_path: Path) -> None:
    before = capture(tmp_path / "a" / "profile" / "step-00000007", (1.0,))
    after = capture(tmp_path / "b" / "profile" / "step-00000007", (2.0,))
    done = CliRunner().invoke(app, ["profile", "diff", str(before), str(after)])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("gemm"))
    assert line.split() == ["gemm", "0.30", "ms", "0.40", "ms", "+0.10", "ms", "+10.0", "%"]


def test_a_difference_is_of_the_steps_that_the_lines_above_it_tell(tmp_path: Path) -> None:
    """A step was told as that of the slowest rank, and their difference as that of the means: one could be slower, and the
    other faster."""
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, steps in ((before, (400, 1350)), (after, (1100, 1120))):
        for rank, microseconds in enumerate(steps):
            write(folder / f"rank{rank}.trace.json.gz", [range_("step:7", 0, microseconds)])
    a, b = load(before), load(after)
    assert b.seconds < a.seconds
    assert sum(b.kinds.values()) > sum(a.kinds.values())
    said = " ".join(CliRunner().invoke(app, ["profile", "diff", str(before), str(after)]).output.split())
    assert f"a step takes {milliseconds(a.seconds)} " in said
    means = " and ".join(milliseconds(sum(one.kinds.values())) for one in (a, b))
    line = f"faster: {milliseconds(a.seconds)} before, {milliseconds(b.seconds)} after, on the slowest rank; the "
    assert f"{line}mean of the ranks, of which times below are: {means}" in said


def test_what_one_profile_does_not_know_has_not_gone(tmp_path: Path) -> None:
    """Weights and moments are older than a trace: without the file beside it, they were told as 0 MiB after."""
    before = capture(tmp_path / "before" / "profile" / "step-00000007")
    (tmp_path / "after").mkdir()
    shutil.copy(before / "rank0.trace.json.gz", tmp_path / "after")
    with_it, without = load(before), load(tmp_path / "after")
    held = {it.name for it in dict(compared(with_it, with_it))["memory at the peak"]}
    assert held - {it.name for it in dict(compared(with_it, without))["memory at the peak"]} == {"weights"}


# -- all ranks on one clock -------------------------------------------------------------------------------------------


def test_ranks_come_on_one_clock(tmp_path: Path, profile: Profile) -> None:
    said = write_merged(profile, tmp_path / "merged.json.gz")
    assert said == "clocks agree within 2 µs"
    events = json.loads(gzip.decompress((tmp_path / "merged.json.gz").read_bytes()))["traceEvents"]
    steps = {it["pid"]: it["ts"] for it in events if it["name"] == "weft:step:7"}
    # rank 1's clock is 5 µs ahead: what it calls 5 was 0 for rank 0
    assert sorted(steps.values()) == [0, 5]
    assert steps[0] == 5
    names = {it["args"]["name"] for it in events if it["name"] == "process_name"}
    assert names == {"rank 0: host", "rank 0: GPU 0", "rank 1: host", "rank 1: GPU 0"}
    assert all(isinstance(it["pid"], int) for it in events)


def test_nothing_of_the_reader_needs_torch(tmp_path: Path) -> None:
    folder = capture(tmp_path / "profile" / "step-00000007")
    code = (
        "import sys\nfrom weft.cli.app import app\n"
        f"try: app(['profile', 'report', {str(folder)!r}, '--html', {str(tmp_path / 'page.html')!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists()
