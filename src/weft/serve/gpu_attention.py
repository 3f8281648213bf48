"""Attention of one token a sequence over the paged cache, on a GPU, in Triton: `native.paged_attention` for CUDA.

torch's attention wants keys and values that lie in a row: to gather them reads all, writes all, and reads them again. Here
each program reads its own blocks where they lie. The keys of a long sequence are dealt out to several programs, as
many as keep the GPU busy, and a second kernel adds up what they found (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

DTYPES = {torch.float32, torch.float16, torch.bfloat16}
TILE = 64
"""Keys that a program takes at once."""
SPLIT = 256
"""Keys that a program has at least, where several share a sequence."""
PROGRAMS = 4
"""For each multiprocessor, where there are keys enough."""


@cache
def available() -> bool:
    """Whether Triton, which torch brings along where there is CUDA, is here."""
    return importlib.util.find_spec("triton") is not None


def attends(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `paged_attention` can be had of these."""
    return q.is_cuda and q.dtype == keys.dtype == values.dtype and q.dtype in DTYPES and available()


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """Each of R tokens q [1, H, R, E] at its own sequence's keys and values: [1, H, R, V]. Of a GPU; see `attends`.

    Args:
        keys, values: of all, [blocks, block, K, E] and [blocks, block, K, V].
        blocks: of each sequence, [R, M].
        mask: 0 where a token looks, -inf where it does not: [R, 1, 1, M · block].
        scale: of the scores; None: 1/√E.
    """
    from weft.serve.gpu_kernels import add_up, look

    _, heads, count, dim = q.shape
    (_, block, kv_heads, _), width, places = keys.shape, values.shape[-1], mask.shape[-1]
    q, blocks, mask = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, blocks, mask))
    splits = num_splits(count * kv_heads, places, multiprocessors(q.device))
    y = q.new_empty(count, heads, width)
    alone = splits == 1
    parts = y if alone else q.new_empty(count, heads, splits, width, dtype=torch.float32)
    weights = y if alone else q.new_empty(count, heads, splits, dtype=torch.float32)
    group = heads // kv_heads
    with torch.cuda.device_of(q):
        look[count, kv_heads, splits](
            q, keys, values, blocks, mask, parts, weights, dim**-0.5 if scale is None else scale,
            q.stride(2), q.stride(1), blocks.stride(0), mask.stride(0), places, -(-places // (splits * TILE)) * TILE,
            splits, kv_heads, block, dim, width, group,
            GROUP=max(16, above(group)), DIM=max(16, above(dim)), WIDTH=max(16, above(width)), TILE=TILE, ALONE=alone,
        )  # fmt: skip
        if not alone:
            add_up[count * heads,](parts, weights, y, splits, width, SPLITS=above(splits), WIDTH=above(width))
    return y.transpose(0, 1).unsqueeze(0)


def num_splits(programs: int, places: int, processors: int) -> int:
    """How many programs share a sequence's keys, where there is one for each of `programs` without that."""
    return max(1, min(-(-places // SPLIT), PROGRAMS * processors // programs))


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def above(count: int) -> int:
    """The power of two that is not below."""
    return 1 << (count - 1).bit_length()
