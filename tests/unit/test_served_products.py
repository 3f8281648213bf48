"""Products of a few rows, against torch's own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft.serve.kernels.native as native
import weft.serve.kernels.products as products
from weft.models.head import Head
from weft.serve.kernels.native import rows_product
from weft.serve.kernels.pages import into_huge_pages
from weft.serve.kernels.products import linear, quicken

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_numbers_are_those_of_linear(rows: int, bias: bool, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ours:
        monkeypatch.setattr(products, "library", lambda: None)
    monkeypatch.setattr(products, "PIECE", 40 * 7)  # 7 rows of the matrix, which do not divide it
    for instructions in ("multiplies_bf16", "has_tiles"):
        monkeypatch.setattr(products, instructions, lambda: False)
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


@pytest.mark.parametrize("rows", [100, 200])
def test_many_rows_of_a_cpu_with_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for instructions in ("multiplies_bf16", "has_tiles"):
        monkeypatch.setattr(products, instructions, lambda: True)
    x, weight, bias = torch.randn(rows, 64).bfloat16(), torch.randn(50, 64).bfloat16(), torch.randn(50).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=2e-2, atol=5e-2)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 15, 16, 33, 48])
@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (16, 5), (39, 3), (64, 8), (211, 2), (64, 32), (96, 81)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_any_size(rows: int, columns: int, outputs: int, dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(rows * columns)
    x, weight, bias = (
        torch.randn(sizes, generator=numbers).to(dtype) for sizes in ((rows, columns), (outputs, columns), (outputs,))
    )
    for added in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        found = rows_product(x, weight, added)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@needs_compiler
def test_the_kernel_rounds_as_torch_does_and_keeps_what_is_no_number() -> None:
    weight = torch.tensor([[1.0], [-3.0], [0.0]]).bfloat16()
    for value in (1e-40, 3.389e38, float("inf"), float("-inf"), float("nan")):
        x = torch.tensor([[value]]).bfloat16()
        torch.testing.assert_close(rows_product(x, weight, None), F.linear(x, weight), equal_nan=True, rtol=0, atol=0)
    halfway = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16()
    ones = torch.ones(1, 2).bfloat16()
    assert rows_product(ones, halfway, None).tolist() == [[1.0, 1.015625]], "to the even neighbour"


@needs_compiler
def test_more_rows_than_stay_in_the_cache_come_in_parts() -> None:
    x, weight, bias = torch.randn(70, 12_800), torch.randn(50, 12_800) / 100, torch.randn(50)
    found = rows_product(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    exact = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double())
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = torch.randn(20, 64).to(dtype), torch.randn(40, 64).to(dtype)
    sound = rows_product(x, weight, None)
    x[3, 5], weight[7, 9] = float("nan"), float("inf")
    found = rows_product(x, weight, None)
    assert found[3].isnan().all()
    assert not found[:, 7].isfinite().any()
    rows, columns = torch.arange(20) != 3, torch.arange(40) != 7
    assert torch.equal(found[rows][:, columns], sound[rows][:, columns])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs"), [(3, 64), (9, 64), (40, 4096)])
def test_threads_share_the_rows_of_a_matrix(rows: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(77, inputs).to(dtype)
    alone = rows_product(x, weight, None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rows_product(x, weight, None), alone)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_the_kernel_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = native.built()
    assert list((tmp_path / "weft").iterdir()) == [file]
    made = file.stat().st_mtime_ns
    assert native.built() == file
    assert file.stat().st_mtime_ns == made


def test_without_a_compiler_or_with_a_broken_one_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    x, weight = torch.randn(1, 2, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    for compilers in ((), ("false",)):
        monkeypatch.setattr(native, "COMPILERS", compilers)
        assert native.library.__wrapped__() is None
        monkeypatch.setattr(products, "library", native.library.__wrapped__)
        with torch.inference_mode():
            torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


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


def test_large_parameters_move_into_huge_pages_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(8, 8), nn.Linear(1024, 1024, bias=False)).bfloat16()
    model[2].weight = model[0].weight
    before = [parameter.detach().clone() for parameter in model.parameters()]
    small = model[1].weight.data_ptr()
    into_huge_pages(model)
    place = model[0].weight.data_ptr()
    into_huge_pages(model)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert model[1].weight.data_ptr() == small
    assert model[2].weight is model[0].weight
    assert model[0].weight.data_ptr() == place, "once"
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert place % (1 << 21) == 0
    model[0](torch.randn(1, 1024).bfloat16()).sum().backward()
    assert model[0].weight.grad is not None
