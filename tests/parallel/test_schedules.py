"""Every schedule, whatever it is combined with, computes what one process computes."""

from __future__ import annotations

import pytest
from harness import Compared, make
from test_parity import right

from weft.config.layout import Layout
from weft.parallel.deferral import Deferral

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


@pytest.mark.parametrize(
    "layout", ["pp2.vp2.interleaved.stages3-1-1-1", "pp2.zbv.stages1-2-1-2", "pp3.zbh1.stages1-4-1"]
)
def test_uneven_stages(layout: str, compared: Compared) -> None:
    config = make("gpt2", "single")
    shape = config.model.model_copy(update={"num_layers": 6})
    right(compared(config.model_copy(update={"model": shape, "layout": Layout.parse(layout)})))


@pytest.mark.parametrize("layout", ["cp2.pp2.zbh1.bf16", "cp2.pp2.zbv.bf16.mb1", "dp2.pp2.zbh1.bf16.mb1"])
def test_copies_without_shards_in_low_precision(layout: str, compared: Compared) -> None:
    """FSDP2 keeps what is yet to be summed over copies in one flat tensor, whose size may not change."""
    right(compared(make("llama", layout)))


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
