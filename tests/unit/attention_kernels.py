"""The kernels of serve/kernels/gpu_kernels.py in Triton's interpreter, against torch's: for test_gpu_attention.py.

TRITON_INTERPRET=1 python attention_kernels.py
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from triton.runtime import interpreter

from weft.models.attention import attend
from weft.serve.kernels import gpu_attention
from weft.serve.kernels.gpu_attention import Tiles, make_tiles, num_splits

BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3}
"""The interpreter's bf16 is not a GPU's."""
HEADS = [(4, 4, 16, 16), (6, 2, 64, 32), (8, 1, 48, 16), (20, 5, 12, 20), (3, 3, 80, 33), (8, 2, 64, 64)]
"""Heads, those of keys, and the widths of a key and of a value."""
COUNTS, ENDS = [1, 1, 1, 20, 130], [1, 9, 300, 37, 130]
"""Of each sequence, its tokens in the batch, and up to the last of them."""
BLOCK = 4


def check(heads: int, kv_heads: int, dim: int, width: int, window: int | None, dtype: torch.dtype) -> None:
    numbers, most, count = torch.Generator().manual_seed(heads), max(ENDS) // BLOCK + 1, sum(COUNTS)

    def fresh(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=numbers).to(dtype)

    stores = [fresh(len(ENDS) * most + 3, BLOCK, kv_heads, size) for size in (dim, width)]
    tables = torch.randperm(len(stores[0]), generator=numbers)[: len(ENDS) * most].view(len(ENDS), most)
    q, k, v = (fresh(1, count, some, size).transpose(1, 2) for some, size in
               ((heads, dim), (kv_heads, dim), (kv_heads, width)))  # fmt: skip
    places = [torch.arange(end - some, end) for some, end in zip(COUNTS, ENDS, strict=True)]
    slots = torch.cat([
        table[place // BLOCK] * BLOCK + place % BLOCK for table, place in zip(tables, places, strict=True)
    ])  # fmt: skip
    expected = [store.clone() for store in stores]
    for store, new in zip(expected, (k, v), strict=True):
        store.flatten(0, 1).index_copy_(0, slots, new[0].transpose(0, 1))
    gpu_attention.keep(k, v, slots, stores[0], stores[1])
    assert all(torch.equal(store, other) for store, other in zip(stores, expected, strict=True))

    ones, several = (torch.tensor(rows) for rows in make_tiles(COUNTS, ENDS, heads // kv_heads))
    longest = max(end for some, end in zip(COUNTS, ENDS, strict=True) if some == 1)
    found = gpu_attention.attend(q, stores[0], stores[1], Tiles(ones, several, tables, longest, window))
    assert found.shape == (1, heads, count, width)
    at = 0
    for table, place, end in zip(tables, places, ENDS, strict=True):
        keys, values = (store[table].flatten(0, 1)[:end].transpose(0, 1)[None].double() for store in stores)
        back = place[:, None] - torch.arange(end)
        seen = (back >= 0) & (back < (window or end))
        exact = attend(q[:, :, at : at + len(place)].double(), keys, values, seen[None, None])
        part = found[:, :, at : at + len(place)].double()
        torch.testing.assert_close(part, exact, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
        at += len(place)


def main() -> None:
    plain = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: interpreter._LangPatchScope) -> None:
        """numpy makes no number of a row of one any more, which the interpreter asks for where a loop ends."""
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    torch.cuda.device_of = lambda x: nullcontext()  # type: ignore[assignment,misc]
    for processors, splits in ((0, 1), (64, 3)):
        gpu_attention.multiprocessors = lambda device, count=processors: count  # type: ignore[assignment]
        assert num_splits(3, 300, processors) == splits
        for dtype in BOUNDS:
            for sizes in HEADS:
                for window in (None, 7, 100):
                    check(*sizes, window, dtype)
    print("right")


if __name__ == "__main__":
    main()
