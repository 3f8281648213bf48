"""Products and messages in one: the same as one process, and as what torch says its operations on GPUs give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Compared, make, run_forked
from test_parity import right
from torch.distributed import _symmetric_memory

from weft.parallel import async_tp, collectives
from weft.parallel.async_tp import ScatterProduct, gather_products, scatter_product
from weft.parallel.tensor import RowLinear


@pytest.mark.parametrize(
    ("model", "layout"),
    [("gpt2", "tp2.sp.asynctp"), ("llama", "tp4.sp.asynctp.pp2.mb2"), ("deepseek", "tp2.sp.asynctp.ep2.etp1")],
)
def test_async_tp(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


def as_torch_says(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    x, whole, weight = torch.randn(2, 3, 8), torch.randn(2, 6, 8), torch.randn(8, 5)
    ours = gather_products(x, [weight, 2 * weight], group)
    theirs = _symmetric_memory._fused_all_gather_matmul_fallback(x, [weight, 2 * weight], 1, group.group_name)
    torch.testing.assert_close((ours[0], *ours[1]), (theirs[0], *theirs[1]))
    mine = scatter_product(whole, weight, group)
    assert mine.shape == (2, 3, 5)
    name = group.group_name
    torch.testing.assert_close(
        mine, _symmetric_memory._fused_matmul_reduce_scatter_fallback(whole, weight, "sum", 1, name)
    )


def test_the_same_as_torch_says() -> None:
    run_forked(2, as_torch_says)


def test_a_gradient_that_is_not_summed_is_caught(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        whole = collectives.all_gather_sequence(grad, ctx.group)
        return whole @ weight, 0.5 * async_tp.PLAIN.of_weight(whole, x), None

    monkeypatch.setattr(ScatterProduct, "backward", staticmethod(backward))
    report = compared(make("llama", "tp2.sp.asynctp"))
    assert not report.right
    assert ".out" in str(report.first_wrong()) or ".down" in str(report.first_wrong())


def test_no_region_gathers_by_itself(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control that what is compared is it: the ways in and out that it replaces are broken."""

    def broken(*_: object) -> torch.Tensor:
        raise AssertionError("a row matrix joined its shares by itself")

    monkeypatch.setattr(RowLinear, "forward", broken)
    right(compared(make("llama", "tp2.sp.asynctp")))
