"""The Triton kernels of parallel/loss.py: a row of logits is read once for its loss, and once for its gradient.

`wide` is where a row's memory ends, at `columns` or behind: up to a round place a GPU reads and writes many at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look(logits, targets, found, row_stride, columns, wide, first, rows, IGNORED: tl.constexpr, TILE: tl.constexpr):
    """One row's largest logit, the sum of exponentials beside it, and the target's logit less the largest, 0 where the
    row's target is no column: found [3, rows]. What is no number, or infinite, makes the sum no number.
    """
    row = tl.program_id(0).to(tl.int64)
    line, place = logits + row * row_stride, tl.arange(0, TILE)
    largest, base = tl.max(tl.full([TILE], float("-inf"), tl.float32), 0), tl.sum(tl.zeros([TILE], tl.float32), 0)
    total = tl.zeros([TILE], tl.float32)
    start = 0
    while start < columns:
        x = tl.load(line + start + place, mask=start + place < wide, other=float("-inf")).to(tl.float32)
        x = tl.where(start + place < columns, x, float("-inf"))
        higher = tl.maximum(largest, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = higher
        start += TILE
    target = tl.load(targets + row)
    column = target - first
    here = (target != IGNORED) & (column >= 0) & (column < columns)
    logit = tl.load(line + column, mask=here, other=0.0).to(tl.float32)
    tl.store(found + row, largest)
    tl.store(found + rows + row, tl.sum(total, 0))
    tl.store(found + 2 * rows + row, tl.where(here, logit - base, 0.0))


@triton.jit
def differentiate(
    logits, targets, peaks, sums, scale, row_stride, columns, wide, first, IGNORED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Some columns of a row of logits become `scale` · the gradient of its loss: their share of the sum, less 1 at the
    target. What lies between the rows becomes 0, up to `wide`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = logits + row * row_stride + place
    target = tl.load(targets + row)
    has_target = target != IGNORED
    share = has_target.to(tl.float32) / tl.load(sums + row)
    x = tl.load(there, mask=place < wide, other=0.0).to(tl.float32)
    hit = (has_target & (place == target - first)).to(tl.float32)
    gradient = (tl.exp(x - tl.load(peaks + row)) * share - hit) * tl.load(scale)
    tl.store(there, tl.where(place < columns, gradient, 0.0).to(logits.dtype.element_ty), mask=place < wide)
