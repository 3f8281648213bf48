"""Products of a few rows, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft.serve.products as products
from weft.models.head import Head
from weft.serve.products import linear, quicken


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_are_those_of_linear(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 40 * 7)  # 7 rows of the matrix, which do not divide it
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    torch.manual_seed(rows)
    x, weight = torch.randn(1, rows, 40), torch.randn(50, 40)
    added = torch.randn(50) if bias else None
    exact = F.linear(x.double(), weight.double(), added.double() if bias else None)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, added).double(), exact, rtol=1e-5, atol=1e-5)
        low = linear(x.bfloat16(), weight.bfloat16(), added.bfloat16() if bias else None)
    assert low.dtype == torch.bfloat16
    plain = F.linear(x.bfloat16(), weight.bfloat16(), added.bfloat16() if bias else None)
    torch.testing.assert_close(low, plain, rtol=2e-2, atol=5e-2)
    assert low.shape == plain.shape
    assert low.is_contiguous()


def test_a_quickened_model_trains_as_before() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Head(8, 5))
    x = torch.randn(1, 3, 8)
    before = model(x)
    quicken(model)
    after = model(x)
    assert torch.equal(before, after)
    after.sum().backward()
    assert model[0].weight.grad is not None
    assert [type(module).__name__ for module in model] == ["ServedLinear", "ServedHead"]
