"""Training in fp8: every cut computes what one process computes in fp8, and learns what bf16 learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Compared, losses, make
from test_parity import right

from weft.config.tree import Config
from weft.parallel import fp8
from weft.parallel.fp8 import E4M3


def wide(model: str, layout: str) -> Config:
    """With a network whose half is a multiple of 16 too."""
    return make(model, layout, **({} if model in ("gpt2", "mixtral") else {"model": {"ffn": 64}}))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "mb4.fp8"),
        ("llama", "dp2.fp8row"),
        ("gpt2", "fsdp2.tp2.sp.fp8"),
        ("llama", "fsdp2.tp2.mb2.fp8row"),
        ("llama", "fsdp2.zero2.pp2.full.fp8"),
        ("llama", "tp2.sp.pp2.selective.fp8row"),
        ("gpt2", "pp2.gpipe.chunked.fp8"),
        ("llama", "cp2.ring.redo-mlp.fp8"),
        ("llama", "pp2.vp2.interleaved.fp8.bf16grads"),
        ("mixtral", "fsdp2.ep2.mb2.fp8"),
    ],
)
def test_fp8_equals_one_process(model: str, layout: str, compared: Compared) -> None:
    right(compared(wide(model, layout)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("layout", ["fsdp2.tp2.sp.full.fp8row.compile"])
def test_fp8_compiled(layout: str, compared: Compared) -> None:
    right(compared(wide("llama", layout)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses in bf16."""
    return losses(wide("llama", "bf16"), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("precision", ["fp8", "fp8row"])
def test_fp8_learns_as_well(precision: str, plain: list[float], tmp_path: Path) -> None:
    """50 steps in which the loss falls by more than half: within 10 % of bf16 at each, and three steps behind at most."""
    coarse = losses(wide("llama", precision), tmp_path)
    assert plain[-1] < plain[0] / 2
    assert plain != coarse
    assert max(abs(a / b - 1) for a, b in zip(plain, coarse, strict=True)) < 0.1
    assert coarse[-1] < plain[-4]


def test_a_scale_that_is_not_undone_is_found(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients, by two processes alone: the loss of the first step is still right."""
    compared(wide("llama", "fp8"))
    whole = fp8.product

    def product(a: Any, b: Any, by_row: bool, kind: torch.dtype = E4M3, fast: bool = False) -> Any:
        y = whole(a, b, by_row, kind, fast)
        return y if kind == E4M3 else y * 2

    monkeypatch.setattr(fp8, "product", product)
    report = compared(wide("llama", "fsdp2.fp8"))
    assert report.worst("output")[0].right
    assert report.first_wrong() == "blocks.2.mlp.down.weight (gradient)"
