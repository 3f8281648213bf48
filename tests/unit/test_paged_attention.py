"""The kernel that attends over the paged cache, against torch's."""

from __future__ import annotations

import pytest
import torch

from weft.models.attention import attend
from weft.serve import native
from weft.serve.native import attends, paged_attention

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


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = torch.empty(1, 2, 1, 16), torch.empty(2, 4, 2, 16)
    assert attends(q, cache, cache)
    assert not attends(q.half(), cache.half(), cache.half())
    assert not attends(q, cache.bfloat16(), cache.bfloat16())
    monkeypatch.setattr(native, "library", lambda: None)
    assert not attends(q, cache, cache)
