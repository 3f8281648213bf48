"""Every cut, alone and combined, computes what one process computes: outputs, loss, gradients, updated weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Compared, make

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
