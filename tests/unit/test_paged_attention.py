"""The kernel that attends over the paged cache, against torch's."""

from __future__ import annotations

import pytest
import torch

from weft.models.attention import attend
from weft.serve.kernels import native
from weft.serve.kernels.native import attends, paged_attention

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("count", "heads", "kv_heads", "dim", "width"),
    [(1, 4, 4, 16, 16), (3, 6, 2, 64, 32), (2, 8, 1, 48, 16), (1, 20, 5, 12, 20), (2, 3, 3, 80, 33)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_is_torchs(
    dtype: torch.dtype, bound: float, count: int, heads: int, kv_heads: int, dim: int, width: int, threads: int
) -> None:
    numbers, block, each = torch.Generator().manual_seed(count), 4, 5
    keys, values = (
        torch.randn(count * each + 2, block, kv_heads, size, generator=numbers).to(dtype) for size in (dim, width)
    )
    q = torch.randn(1, count, heads, dim, generator=numbers).to(dtype).transpose(1, 2)
    blocks = torch.randperm(len(keys), generator=numbers)[: count * each].view(count, each)
    place = torch.arange(block * each)
    first, last = torch.arange(count)[:, None], 20 - 7 * torch.arange(count)[:, None]
    hidden = (place < first) | (place >= last)  # as windows and other lengths make it
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for scale in (None, 0.3):
            found = paged_attention(q, keys, values, blocks, mask, scale)
            assert found.shape == (1, heads, count, width)
            for row in range(count):
                k, v = (store[blocks[row]].flatten(0, 1).transpose(0, 1)[None].double() for store in (keys, values))
                exact = attend(q[:, :, row : row + 1].double(), k, v, mask[row : row + 1].double(), scale)
                torch.testing.assert_close(found[:, :, row].double(), exact[:, :, 0], rtol=bound, atol=bound)
        if count == 1:
            swapped = keys[blocks[0]].contiguous(), values[blocks[0]].contiguous()
            in_a_row = paged_attention(q, *swapped, range(each), mask, None)
            assert torch.equal(in_a_row, paged_attention(q, keys, values, blocks, mask, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["key", "value"])
def test_what_is_no_number_is_seen_by_its_head_alone(dtype: torch.dtype, bad: str) -> None:
    numbers = torch.Generator().manual_seed(0)
    stores = {name: torch.randn(3, 4, 2, 32, generator=numbers).to(dtype) for name in ("key", "value")}
    stores[bad][1, 2, 1, 5] = float("nan")
    mask = torch.zeros(2, 1, 1, 4, dtype=dtype)
    found = paged_attention(
        torch.ones(1, 4, 2, 32, dtype=dtype), *stores.values(), torch.tensor([[0], [1]]), mask, None
    )
    assert found[0, :, 0].isfinite().all()
    assert found[0, :2, 1].isfinite().all()
    assert found[0, 2:, 1].isnan().any(dim=-1).all()


def test_far_less_likely_places_weigh_nothing() -> None:
    keys = torch.zeros(1, 4, 1, 16)
    keys[0, 1] = 1e3
    values = torch.arange(4.0)[None, :, None, None].expand(1, 4, 1, 16).contiguous()
    found = paged_attention(torch.ones(1, 1, 1, 16), keys, values, torch.tensor([[0]]), torch.zeros(1, 1, 1, 4), None)
    assert torch.equal(found, torch.ones(1, 1, 1, 16))


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = torch.empty(1, 2, 1, 16), torch.empty(2, 4, 2, 16)
    assert attends(q, cache, cache)
    assert not attends(q.half(), cache.half(), cache.half())
    assert not attends(q, cache.bfloat16(), cache.bfloat16())
    monkeypatch.setattr(native, "library", lambda: None)
    assert not attends(q, cache, cache)
