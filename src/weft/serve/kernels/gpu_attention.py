"""Attention over the paged cache on a GPU, of all sequences of a batch at once, in Triton.

torch's attention wants the keys of one sequence in a row, and a mask: to gather them reads all, writes all, and reads them
again, sequence by sequence. Here each program takes a few tokens of one sequence, and finds its keys where they lie; a
token's place says what it sees. The keys of a long sequence that has one token here are dealt out to several programs, as
many as keep the GPU busy, and a second kernel adds up what they found (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from weft.models.triton import has_triton

DTYPES = {torch.float32, torch.float16, torch.bfloat16}
TILE = 64
"""Keys that a program takes at once."""
ROWS = 64
"""Queries, of all heads that share keys, that a program takes where a sequence has several tokens."""
FEWEST = 16
"""Rows of a matrix product in Triton."""
SPLIT = 128
"""Keys that a program has at least, where several share a sequence."""
PROGRAMS = 6
"""For each multiprocessor, where there are keys enough."""
FIELDS = 4
"""Of a tile: its sequence, the place of its first token in the batch, how many, and the first one's place in the text."""


@dataclass(frozen=True)
class Tiles:
    """What looks at what, on the device.

    Attributes:
        ones: of sequences with one token in the batch, [R, 4]: see FIELDS.
        several: of the others, some tokens each, [S, 4].
        tables: blocks of each sequence, from its first one on, [sequences, M].
        longest: tokens, at most, of a sequence in `ones`.
        window: each token sees this many back, itself included; None: all.
    """

    ones: Tensor
    several: Tensor
    tables: Tensor
    longest: int
    window: int | None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention can be had here: Triton comes with torch wherever there is CUDA."""
    return device.type == "cuda" and dtype in DTYPES and has_triton()


def tokens_of_tile(group: int) -> int:
    """Of a sequence with several, where `group` heads share keys."""
    return max(1, ROWS // group)


def make_tiles(counts: Sequence[int], ends: Sequence[int], group: int) -> tuple[list[list[int]], list[list[int]]]:
    """Those of one token, and the others: each its FIELDS. Of tokens of each sequence in the batch, and up to the last."""
    ones: list[list[int]] = []
    several: list[list[int]] = []
    size, at = tokens_of_tile(group), 0
    for number, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count == 1:
            ones.append([number, at, 1, end - 1])
        else:
            several += [
                [number, at + first, min(size, count - first), end - count + first] for first in range(0, count, size)
            ]
        at += count
    return ones, several


def keep(k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Keep k [1, K, N, E] and v [1, K, N, V] at slots [N], in what `attend` reads."""
    from weft.serve.kernels import gpu_kernels

    _, heads, count, dim = k.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with torch.cuda.device_of(k):
        gpu_kernels.keep[count, heads](
            k, v, slots, keys, values, k.stride(2), k.stride(1), v.stride(2), v.stride(1), heads, dim, v.shape[-1],
            DIM=above(dim), WIDTH=above(v.shape[-1]), num_warps=1,
        )  # fmt: skip


def attend(q: Tensor, keys: Tensor, values: Tensor, tiles: Tiles, scale: float | None = None) -> Tensor:
    """q [1, H, N, E], each token at its own sequence up to itself: [1, H, N, V].

    Args:
        keys, values: of all, [blocks, block, K, E] and [blocks, block, K, V].
        scale: of the scores; None: 1/√E.
    """
    _, heads, count, dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    y = q.new_empty(count, heads, values.shape[-1])
    scale = dim**-0.5 if scale is None else scale
    group = heads // keys.shape[2]
    with torch.cuda.device_of(q):
        if len(tiles.several):
            _look(q, keys, values, tiles, tiles.several, y, 1, tokens_of_tile(group), scale)
        if len(tiles.ones):
            programs = len(tiles.ones) * keys.shape[2]
            splits = num_splits(programs, tiles.longest, multiprocessors(q.device))
            _look(q, keys, values, tiles, tiles.ones, y, splits, 1, scale)
    return y.transpose(0, 1).unsqueeze(0)


def _look(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tiles,
    some: Tensor,
    y: Tensor,
    splits: int,
    tokens: int,
    scale: float,
) -> None:
    """Fills y [N, H, V] for the tokens of some tiles, which have at most so many; each by `splits` programs."""
    from weft.serve.kernels.gpu_kernels import add_up, look

    (_, block, kv_heads, dim), (_, heads, width) = keys.shape, y.shape
    group = heads // kv_heads
    shared = (len(some), heads, splits)
    parts = y if splits == 1 else y.new_empty(*shared, width, dtype=torch.float32)
    weights = y if splits == 1 else y.new_empty(shared, dtype=torch.float32)
    rows = max(FEWEST, above(tokens * group))
    look[len(some), kv_heads, splits](
        q, keys, values, tiles.tables, some, parts, weights, scale, q.stride(2), q.stride(1), tiles.tables.stride(0),
        tiles.window or 0, kv_heads, dim, width, group,
        BLOCK=block, ROWS=rows, DIM=max(FEWEST, above(dim)), WIDTH=max(FEWEST, above(width)), TILE=TILE, SPLITS=splits,
        num_warps=4, num_stages=3 if rows == FEWEST else 2,
    )  # fmt: skip
    if splits > 1:
        add_up[len(some), heads](
            parts, weights, some, y, heads, width, SPLITS=splits, MOST=above(splits), WIDTH=above(width)
        )


def num_splits(programs: int, longest: int, processors: int) -> int:
    """How many programs share a sequence's keys, where there is one for each of `programs` without that."""
    return max(1, min(-(-longest // SPLIT), PROGRAMS * processors // programs))


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def above(count: int) -> int:
    """The power of two that is not below."""
    return 1 << (count - 1).bit_length()
