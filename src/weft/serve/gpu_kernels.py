"""The Triton kernels of gpu_attention.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look(
    q, keys, values, tables, mask, parts, weights, scale,
    q_row, q_head, table_row, mask_row, places, share,
    splits, kv_heads, block, dim, width, group,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """One sequence's token, the `group` query heads that share one head of keys, one share of the keys.

    Writes the weighted mean of the values it saw, and the logarithm of what it divided by; ALONE: only the mean.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    mine, wide, broad = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, WIDTH)
    head = kv_head * group + mine
    own = (mine < group)[:, None]
    queries = tl.load(
        q + row * q_row + head[:, None] * q_head + wide[None, :], mask=own & (wide < dim)[None, :], other=0.0
    )
    largest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mean = tl.zeros([GROUP, WIDTH], tl.float32)
    first, stop = split * share, tl.minimum((split + 1) * share, places)
    while first < stop:
        place = first + tl.arange(0, TILE)
        inside = place < stop
        seen = tl.load(mask + row * mask_row + place, mask=inside, other=float("-inf")).to(tl.float32) == 0.0
        if tl.max(seen.to(tl.int32)) > 0:  # what nobody sees is not read: it may be no number
            number = tl.load(tables + row * table_row + place // block, mask=seen, other=0)
            vector = (number * block + place % block) * kv_heads + kv_head
            key = tl.load(
                keys + vector[None, :] * dim + wide[:, None], mask=seen[None, :] & (wide < dim)[:, None], other=0.0
            )
            score = tl.dot(queries, key, input_precision="ieee") * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            factor, weight = tl.exp(largest - higher), tl.exp(score - higher[:, None])
            value = tl.load(
                values + vector[:, None] * width + broad[None, :],
                mask=seen[:, None] & (broad < width)[None, :],
                other=0.0,
            )
            mean = mean * factor[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            total = total * factor + tl.sum(weight, 1)
            largest = higher
        first += TILE
    kept = own & (broad < width)[None, :]
    at = row * kv_heads * group + head
    if ALONE:
        tl.store(parts + at[:, None] * width + broad[None, :], mean / total[:, None], mask=kept)
    else:
        mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(parts + (at * splits + split)[:, None] * width + broad[None, :], mean, mask=kept)
        tl.store(weights + at * splits + split, largest + tl.log(total), mask=mine < group)


@triton.jit
def add_up(parts, weights, y, splits, width, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """One head of one token: the mean of its shares' means, each as heavy as what it was divided by."""
    at = tl.program_id(0).to(tl.int64)
    split, broad = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = split < splits
    weight = tl.load(weights + at * splits + split, mask=there, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    kept = there[:, None] & (broad < width)[None, :]
    part = tl.load(parts + (at * splits + split)[:, None] * width + broad[None, :], mask=kept, other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y + at * width + broad, mean, mask=broad < width)
