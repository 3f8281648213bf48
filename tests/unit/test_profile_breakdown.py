"""A step's time, attributed: of synthetic CUDA traces, and of hand-made CPU ones. Every kind adds up to the wall time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_traces import HOST, MAIN, cuda_step, op, range_, write

from weft.profile.attribution import Attribution
from weft.profile.breakdown import Breakdown, Slice, merged, overlap, paint
from weft.profile.trace import Trace, read_trace

GROUPS = {"3": "fsdp", "9": "pp"}


def breakdown(events: list[dict], only_axis: str = "", groups: dict[str, str] = GROUPS) -> Breakdown:
    return Breakdown(Attribution(Trace({"traceEvents": events}), groups, only_axis))


def microseconds(kinds: dict[str, float]) -> dict[str, float]:
    return {kind: round(1e6 * seconds, 3) for kind, seconds in kinds.items()}


def test_a_gpu_step_is_what_its_streams_did() -> None:
    (step,) = breakdown(cuda_step()).steps
    assert step.number == 7
    assert microseconds(step.kinds) == {
        "gemm": 300,
        "element-wise": 50,
        "optimizer": 80,
        "copy": 10,
        "fsdp exposed": 50,  # of 150: the first 100 lie under the product and the activation
        "bubble": 60,
        "data wait": 15,  # the host waits for a batch, and nothing runs
        "host": 435,
    }
    assert sum(step.kinds.values()) == pytest.approx(step.seconds, rel=1e-12)


def test_kernels_belong_to_the_module_that_launched_them_backward_too() -> None:
    (step,) = breakdown(cuda_step()).steps
    found = {key: round(1e6 * seconds) for key, seconds in step.parts.items()}
    assert found["blocks.0.mlp", "forward", "gemm"] == 200
    assert found["blocks.0.mlp", "forward", "element-wise"] == 50
    assert found["blocks.0.mlp", "backward", "gemm"] == 100  # launched by autograd's thread, which has no ranges


def test_messages_are_told_by_axis_with_what_hides_them() -> None:
    traffic = {(it.axis, it.kind): it for it in breakdown(cuda_step()).traffic()}
    gathered = traffic["fsdp", "all_gather"]
    assert [round(1e6 * it) for it in (gathered.seconds, gathered.exposed, gathered.overlapped)] == [150, 50, 100]
    assert gathered.bytes == 2000
    assert round(1e6 * traffic["pp", "send/recv"].exposed) == 60


def test_groups_that_nobody_named_are_known_by_their_mesh() -> None:
    kinds = breakdown(
        [{**it, "args": {k: v for k, v in it["args"].items() if k != "Process Group Name"}} for it in cuda_step()]
    )
    assert "bubble" in kinds.steps[0].kinds  # mesh_pp


def cpu_step() -> list[dict]:
    """100 µs on a CPU: a product in attention, its backward, an all-reduce of tp that is waited for."""
    gloo = {
        **op("gloo:all_reduce", 44, 20, MAIN + 1, Input_Dims=[[16]], Input_type=["float"]),
        "cat": "user_annotation",
    }
    return [
        range_("step:1", 0, 100),
        range_("module:blocks.2.attention", 5, 35),
        op("aten::linear", 10, 20, Sequence_number=3),
        op("aten::mm", 12, 16, Sequence_number=3, Input_Dims=[[8, 4], [4, 2]], Input_type=["float", "float"]),
        range_("comm:tp", 42, 3),
        op("c10d::allreduce_", 43, 1),
        gloo,
        range_("wait", 46, 19),
        op("autograd::engine::evaluate_function: MmBackward0", 70, 20, Sequence_number=3, Fwd_thread_id=1),
        op("aten::mm", 72, 15, Input_Dims=[[8, 4], [4, 2]], Input_type=["float", "float"]),
    ]


def test_a_cpu_step_is_what_its_thread_did() -> None:
    found = breakdown(cpu_step())
    (step,) = found.steps
    # linear's own 4 µs beside its product's 16 are a product's too; the wait is 19, the call that asks for it 1
    assert microseconds(step.kinds) == {"gemm": 35, "tp exposed": 20, "host": 45}
    assert sum(step.kinds.values()) == pytest.approx(step.seconds, rel=1e-12)
    parts = {key: round(1e6 * seconds) for key, seconds in step.parts.items()}
    assert parts["blocks.2.attention", "backward", "gemm"] == 15
    (message,) = found.traffic()
    assert (message.axis, message.kind, message.count, message.bytes) == ("tp", "all_reduce", 1, 64)
    # of its 20 µs under way it was waited for in 18; the call before and the wait's last one are its as well
    assert [round(1e6 * it) for it in (message.seconds, message.exposed, message.overlapped)] == [20, 20, 2]


def test_what_messages_of_an_axis_are_stood_still_for_is_what_a_step_says() -> None:
    gathered = {**next(it for it in cpu_step() if it["name"] == "gloo:all_reduce"), "name": "gloo:all_gather", "ts": 80}
    asked = [range_("comm:tp", 76, 3), op("c10d::_allgather_base_", 77, 1), {**gathered, "dur": 6}]
    found = breakdown([*cpu_step(), *asked, range_("wait", 91, 8)])
    (step,) = found.steps
    traffic = {it.kind: it for it in found.traffic()}
    assert set(traffic) == {"all_reduce", "all_gather"}
    assert sum(it.exposed for it in traffic.values()) == pytest.approx(step.kinds["tp exposed"], rel=1e-12)


def test_a_reduce_scatter_that_gloo_makes_of_an_all_reduce_keeps_its_name() -> None:
    events = [
        {**it, "name": "c10d::_reduce_scatter_base_"} if it["name"] == "c10d::allreduce_" else it for it in cpu_step()
    ]
    (message,) = breakdown(events).traffic()
    assert (message.axis, message.kind) == ("tp", "reduce_scatter")


def test_what_is_computed_again_is_told_apart() -> None:
    events = [*cpu_step(), range_("module:blocks.2.attention", 71, 17)]
    (step,) = breakdown(events).steps
    assert ("blocks.2.attention", "recompute", "gemm") in step.parts


def test_a_wait_without_a_name_belongs_to_the_message_that_ends_with_it() -> None:
    events = [it for it in cpu_step() if it["name"] != "weft:comm:tp"]
    assert "tp exposed" in breakdown(events, only_axis="tp").steps[0].kinds
    assert "all exposed" in breakdown(events).steps[0].kinds


spans = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30)).map(lambda it: (it[0], it[0] + it[1])), max_size=12)


@given(spans, spans)
def test_paint_fills_a_step_without_gap_or_overlap(one: list, other: list) -> None:
    gaps, painted = [(0.0, 100.0)], []
    for kind, layer in (("a", one), ("b", other)):
        slices = sorted(Slice(start, stop, kind, "", "", "") for start, stop in layer)
        found, gaps = paint(gaps, slices)
        painted += found
    edges = sorted([(it.start, it.stop) for it in painted] + gaps)
    assert edges[0][0] == 0
    assert edges[-1][1] == 100
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    covered = sum(it.stop - it.start for it in painted if it.kind == "a")
    assert covered == overlap(merged(one), [(0, 100)])


# -- the reader -------------------------------------------------------------------------------------------------------


def test_a_trace_is_read_gzipped_or_not(tmp_path: Path) -> None:
    plain, packed = (read_trace(write(tmp_path / name, cpu_step())) for name in ("a.json", "b.json.gz"))
    assert len(plain.threads[HOST]) == len(packed.threads[HOST]) == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no whole trace"),
        (b"{}", "has no traceEvents"),
        (b"[1, 2]", "that are no events"),
        (b"\x1f\x8b\x08", "is no whole trace"),
    ],
)
def test_a_damaged_trace_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / ("rank0.json.gz" if content[0] == 0x1F else "rank0.json")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_trace(file)
