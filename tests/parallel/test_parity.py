"""Every cut, alone and combined, computes what one process computes: outputs, loss, gradients, updated weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import MODELS, Compared, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.schedules.orders import ORDERS
from weft.verify.layout import KINDS, LayoutReport

ALONE = [
    "mb4", "full", "selective",
    "dp2", "dp2.mb2", "fsdp2", "fsdp2.mb2", "fsdp2.zero1.mb2", "fsdp2.zero2.mb2", "tp2", "tp2.sp",
    "pp2", "pp2.gpipe", "pp2.stages3-1", "fsdp4", "dp4.mb1", "pp4", "pp4.gpipe.mb1",
]  # fmt: skip
COMBINED = [
    "dp2.fsdp2.mb2", "dp2.fsdp2.zero1.mb2", "dp2.fsdp2.zero2.mb2", "dp2.tp2", "dp2.pp2.mb1", "fsdp2.tp2.sp.mb2",
    "fsdp2.zero1.tp2.mb2", "pp2.tp2.sp.full", "pp2.fsdp2.mb1", "pp2.fsdp2.zero1.mb1", "pp2.fsdp2.zero2.gpipe.mb2",
    "dp2.tp2.sp.pp2.selective.mb2", "fsdp2.tp2.pp2.mb1", "fsdp2.zero2.tp2.sp.pp2.full.mb1", "dp2.fsdp2.tp2.mb1",
    "dp2.fsdp2.pp2.selective.mb1", "fsdp8",
]  # fmt: skip


def right(report: LayoutReport) -> None:
    worst = [str(d) for kind in KINDS for d in report.worst(kind)]
    assert report.right, f"{report.layouts[1]} parts ways at {report.first_wrong()}:\n" + "\n".join(worst)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", ALONE + COMBINED)
def test_layout_equals_one_process(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


@pytest.mark.parametrize("layout", ["dp2.fsdp2.mb2", "tp2.sp", "fsdp2.tp2.sp.pp2.mb1", "pp4"])
def test_tied_qk_norm_sliding_window(layout: str, compared: Compared) -> None:
    right(compared(make("qwen3", layout)))


@pytest.mark.parametrize(
    "layout", ["mb4", "dp2", "fsdp2.mb2", "fsdp4.mb1", "pp2", "dp2.fsdp2.zero1.mb2", "fsdp2.zero2.pp2.full.mb1"]
)
def test_experts(layout: str, compared: Compared) -> None:
    """Whatever part of the batch a process has, a token's experts are the same; fsdp cuts through the middle of them."""
    right(compared(make("mixtral", layout)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "layout", ["mb4", "dp2.mb2", "fsdp2.zero2.mb2", "tp2.sp", "pp2", "fsdp2.tp2.sp.pp2.selective.mb1"]
)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_low_precision(model: str, layout: str, precision: str, compared: Compared) -> None:
    right(compared(make(model, f"{layout}.{precision}")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", "mb4.compile"),
        ("gpt2", "fsdp2.tp2.sp.compile"),
        ("llama", "pp2.compile.full"),
        ("llama", "fsdp2.zero2.mb2.selective.bf16.compile"),
        ("gpt2", "dp2.mb2.bf16.compile"),
    ],
)
def test_compiled_blocks(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


@pytest.mark.parametrize("layout", ["dp2.fsdp2.mb1", "tp2.sp", "pp2.mb1", "fsdp2.tp2.sp.pp2.mb2"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_document_masks(model: str, layout: str, documents: Path, compared: Compared) -> None:
    """Replicas and micro-batches have unequal numbers of targets: a mean of means would be wrong."""
    right(compared(make(model, layout, data={"paths": [str(documents)], "document_mask": True, "split": (1, 0, 0)})))


def accepted() -> st.SearchStrategy[Config]:
    fields = st.fixed_dictionaries(
        {
            "dp": st.sampled_from([1, 2, 4]),
            "fsdp": st.sampled_from([1, 2, 4]),
            "cp": st.sampled_from([1, 2, 4]),
            "cp_kind": st.sampled_from(["allgather", "ring", "ulysses"]),
            "tp": st.sampled_from([1, 2, 4]),
            "pp": st.sampled_from([1, 2, 4]),
            "zero": st.sampled_from([1, 2, 3]),
            "sp": st.booleans(),
            "ep": st.sampled_from([1, 2, 4]),
            "etp": st.sampled_from([None, 1, 2]),
            "schedule": st.sampled_from(list(ORDERS)),
            "vp": st.sampled_from([1, 2]),
            "micro_batch": st.sampled_from([None, 1, 2]),
            "recompute": st.sampled_from(["none", "selective", "full"]),
        }
    )
    return st.tuples(st.sampled_from(sorted(MODELS)), fields).map(lambda drawn: config_of(*drawn)).filter(bool)


def config_of(model: str, fields: dict) -> Config | None:
    """None where the layout is refused or takes more than 8 processes."""
    try:
        layout = Layout(**fields)
        return make(model, str(layout)) if 1 < layout.world <= 8 else None
    except ValueError:
        return None


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "10")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(config=accepted())
def test_any_accepted_layout(config: Config, compared: Compared) -> None:
    right(compared(config))
