"""Every schedule, whatever it is combined with, computes what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from harness import Compared, make, run_forked
from test_parity import right

from weft.config.layout import Layout
from weft.parallel import deferral
from weft.parallel.deferral import Deferral
from weft.parallel.woven import Passes, Woven
from weft.plan.memory.activations import Pass
from weft.plan.memory.passes import kept_bytes
from weft.plan.memory.stage import stages
from weft.schedules.table import held
from weft.train.training import build
from weft.verify.trace import step_rows

SCHEDULES = ["gpipe", "1f1b", "interleaved.vp2", "bfs.vp2", "zbh1", "zbv", "dualpipev"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["gpt2", "llama", "qwen3"])
def test_schedule_equals_one_process(model: str, schedule: str, compared: Compared) -> None:
    right(compared(make(model, f"pp2.{schedule}")))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "dp2.pp2.zbv"),
        ("llama", "dp2.pp2.zbh1"),
        ("gpt2", "tp2.sp.pp2.zbh1"),
        ("qwen3", "tp2.pp2.zbv"),
        ("llama", "fsdp2.pp2.zbv"),
        ("gpt2", "fsdp2.zero1.pp2.zbv"),
        ("qwen3", "fsdp2.zero2.pp2.zbv"),
        ("qwen3", "fsdp2.pp2.zbh1"),
        ("gpt2", "fsdp2.pp2.dualpipev.mb1"),
        ("llama", "fsdp2.zero1.pp2.zbh1"),
        ("qwen3", "fsdp2.zero2.pp2.vp2.interleaved.mb2"),
        ("gpt2", "fsdp2.pp2.vp2.bfs.mb2"),
        ("qwen3", "dp2.pp2.vp2.interleaved.full"),
        ("gpt2", "pp4.zbh1.stages1-1-1-1"),
        ("llama", "chunked.pp2.zbh1"),
        ("qwen3", "chunked.fsdp2.tp2.sp.pp2.zbv.mb2"),
        ("mixtral", "dp2.ep2.pp2.zbh1.mb2"),
        ("mixtral", "fsdp2.ep2.pp2.zbv.mb2"),
        ("deepseek", "fsdp2.ep2.pp2.dualpipev.mb2.full"),
    ],
)
def test_schedules_combined(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


@pytest.mark.parametrize(
    "layout", ["dp2.fsdp2.zero2.pp2.zbv.mb1", "dp2.fsdp2.pp2.dualpipev.mb1", "fsdp2.tp2.sp.pp2.zbv.full"]
)
def test_schedules_on_eight(layout: str, compared: Compared) -> None:
    right(compared(make("qwen3", layout)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "layout", ["pp2.zbv", "fsdp2.zero2.pp2.zbh1", "fsdp2.zero1.pp2.dualpipev", "fsdp2.pp2.zbv.selective"]
)
def test_schedules_in_low_precision(layout: str, precision: str, compared: Compared) -> None:
    right(compared(make("qwen3", f"{layout}.{precision}")))


@pytest.mark.parametrize(
    "layout", ["pp2.zbh1.full", "pp2.zbv.selective", "pp2.zbv.full", "pp2.stages2-2.zbh1.selective"]
)
def test_what_is_computed_again_is_put_off_too(layout: str, compared: Compared) -> None:
    right(compared(make("llama", layout)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", "pp2.zbh1.compile"),
        ("gpt2", "fsdp2.pp2.dualpipev.mb1.compile"),
        ("qwen3", "fsdp2.tp2.sp.pp2.zbv.full.compile"),
        ("llama", "fsdp2.zero2.pp2.zbh1.selective.bf16.compile"),
    ],
)
def test_compiled_blocks_put_off_too(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


@pytest.mark.parametrize(
    "layout", ["pp2.vp2.interleaved.stages3-1-1-1", "pp2.zbv.stages1-2-1-2", "pp3.zbh1.stages1-4-1"]
)
def test_uneven_stages(layout: str, compared: Compared) -> None:
    config = make("gpt2", "single")
    shape = config.model.model_copy(update={"num_layers": 6})
    right(compared(config.model_copy(update={"model": shape, "layout": Layout.parse(layout)})))


@pytest.mark.parametrize(
    "layout",
    [
        "cp2.pp2.zbh1.bf16",
        "cp2.pp2.zbh1.bf16.bf16grads",
        "cp2.pp2.zbv.bf16.bf16grads.mb1",
        "dp2.pp2.zbh1.bf16.bf16grads.mb1",
        "dp2.pp2.zbh1.bf16.mb1",
    ],
)
def test_copies_without_shards_in_low_precision(layout: str, compared: Compared) -> None:
    """FSDP2 keeps what is yet to be summed over copies in one flat tensor, whose size may not change."""
    right(compared(make("llama", layout)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_memory_that_the_compiler_uses_again_is_found(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """What is put off, without the copy of it: nothing fails, and the gradients are wrong."""
    monkeypatch.setattr(deferral, "_copy", lambda x: x)
    report = compared(make("llama", "pp2.zbh1.compile"))
    assert not report.right
    assert report.worst("gradient")[0].error > 0.1


def test_weights_left_out_are_found(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Of one micro-batch, one chunk's matrices never get the gradients that were put off."""
    whole = Deferral.catch_up

    def catch_up(self: Deferral, micro_batch: int) -> None:
        if micro_batch == 1:
            self.queue[1] = []
        whole(self, micro_batch)

    compared(make("llama", "single"))
    monkeypatch.setattr(Deferral, "catch_up", catch_up)
    report = compared(make("llama", "pp2.zbh1"))
    assert not report.right
    assert report.worst("gradient")[0].error > 0.1


@pytest.mark.parametrize(("schedule", "processes"), [("zbv", 2), ("dualpipev", 2), ("zbh1", 4)])
def test_what_is_held_is_what_the_plan_says(schedule: str, processes: int) -> None:
    """After every operation of the second process: what autograd keeps, what was put off, what was sent on."""
    config = make("gpt2", f"pp{processes}.{schedule}.mb2")
    layout = config.layout
    table = layout.table(layout.num_micro_batches(16))
    stage = stages(config.model, layout)[1]
    one = Pass.of(config.model, layout, 2, config.seq)
    planned = [kept_bytes(now, table, stage, one, logits=0) for now in held(table, 1)]

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        rows = step_rows(training, None, 1)
        if rank == 1:
            measured = Kept(training.woven)
            training.woven.train_pass(rows, 1.0)
            assert max(measured.sizes) == pytest.approx(max(planned), rel=0.05)
            assert measured.sizes == pytest.approx(planned, rel=0.05, abs=0.05 * max(planned))
        else:
            training.woven.train_pass(rows, 1.0)

    run_forked(processes, work)


class Kept:
    """Bytes that a process keeps for later operations, after each."""

    def __init__(self, woven: Woven) -> None:
        self.woven, self.alive, self.sizes = woven, [], []
        self.weights = {weight.data.untyped_storage().data_ptr() for weight in woven.weights}
        for name in ("forward", "backward", "weights"):
            setattr(Passes, name, self.counted(getattr(Passes, name)))

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.x):
                result = operation(*arguments)
            if result is not None:
                self.alive.append(ref(result))
            self.count()
            return result

        return run

    def pack(self, x: torch.Tensor) -> Box:
        box = Box(x)
        self.alive.append(ref(box))
        return box

    def count(self) -> None:
        there = [getattr(thing, "x", thing) for box in self.alive if (thing := box()) is not None]
        for chunk in self.woven.chunks.values():
            assert chunk.deferral is not None
            there += [x for noted in chunk.deferral.queue.values() for _, *pair in noted for x in pair]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in there}
        self.sizes.append(sum(size for place, size in sizes.items() if place not in self.weights))


class Box:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
