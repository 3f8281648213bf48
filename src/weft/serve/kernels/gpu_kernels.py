"""The Triton kernels of gpu_attention.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(
    k, v, slots, keys, values, k_token, k_head, v_token, v_head, kv_heads, dim, width,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one token: its key and its value to its slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(slots + token) * kv_heads + head
    wide, broad = tl.arange(0, DIM), tl.arange(0, WIDTH)
    key = tl.load(k + token * k_token + head * k_head + wide, mask=wide < dim)
    value = tl.load(v + token * v_token + head * v_head + broad, mask=broad < width)
    tl.store(keys + at * dim + wide, key, mask=wide < dim)
    tl.store(values + at * width + broad, value, mask=broad < width)


@triton.jit
def look(
    q, keys, values, tables, tiles, parts, weights, scale, q_token, q_head, table_row, window, kv_heads, dim, width, group,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence, the `group` query heads that share one head of keys, one share of the keys.

    Writes the weighted mean of the values it saw; where there are several shares, into `parts`, and the logarithm of what
    it divided by into `weights`.
    """
    number, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, at = tl.load(tiles + number * 4), tl.load(tiles + number * 4 + 1)
    count, place = tl.load(tiles + number * 4 + 2), tl.load(tiles + number * 4 + 3)
    mine, wide, broad = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, WIDTH)
    token, head = mine // group, kv_head * group + mine % group
    own = token < count
    queries = tl.load(
        q + (at + token)[:, None] * q_token + head[:, None] * q_head + wide[None, :],
        mask=own[:, None] & (wide < dim)[None, :], other=0.0,
    )  # fmt: skip
    query = place + token
    first, stop = place * 0, place + count
    if window > 0:
        first = tl.maximum(first, place - window + 1)
    share = tl.cdiv(tl.cdiv(stop - first, SPLITS), TILE) * TILE
    first = first + split * share
    stop = tl.minimum(first + share, stop)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, stop, TILE):
        key_place = start + tl.arange(0, TILE)
        inside = key_place < stop
        block = tl.load(tables + sequence * table_row + key_place // BLOCK, mask=inside, other=0)
        vector = (block * BLOCK + key_place % BLOCK) * kv_heads + kv_head
        key = tl.load(
            keys + vector[None, :] * dim + wide[:, None], mask=inside[None, :] & (wide < dim)[:, None], other=0.0
        )
        value = tl.load(
            values + vector[:, None] * width + broad[None, :],
            mask=inside[:, None] & (broad < width)[None, :],
            other=0.0,
        )
        seen = inside[None, :] & (key_place[None, :] <= query[:, None])
        if window > 0:
            seen = seen & (key_place[None, :] > query[:, None] - window)
        score = tl.where(seen, tl.dot(queries, key, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
        factor, weight = tl.exp(largest - base), tl.exp(score - base[:, None])
        mean = mean * factor[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * factor + tl.sum(weight, 1)
        largest = higher
    kept = own[:, None] & (broad < width)[None, :]
    mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = kv_heads * group
    if SPLITS == 1:
        tl.store(parts + ((at + token) * heads + head)[:, None] * width + broad[None, :], mean, mask=kept)
    else:  # there is one token
        part = (number * heads + head) * SPLITS + split
        tl.store(parts + part[:, None] * width + broad[None, :], mean, mask=kept)
        tl.store(weights + part, largest + tl.log(total), mask=own)


@triton.jit
def add_up(
    parts, weights, tiles, y, heads, width, SPLITS: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One head of one token: the mean of its shares' means, each as heavy as what it was divided by."""
    number, head = tl.program_id(0), tl.program_id(1)
    at = tl.load(tiles + number * 4 + 1)
    split, broad = tl.arange(0, MOST), tl.arange(0, WIDTH)
    first = (number * heads + head) * SPLITS
    weight = tl.load(weights + first + split, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    kept = (weight > 0.0)[:, None] & (broad < width)[None, :]
    part = tl.load(parts + (first + split)[:, None] * width + broad[None, :], mask=kept, other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y + (at * heads + head) * width + broad, mean, mask=broad < width)
