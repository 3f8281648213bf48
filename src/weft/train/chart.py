"""A line drawn with braille dots, for a terminal: two dots wide and four high in each character. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of the left and right half of a character, downwards

Points = Sequence[tuple[float, float]]


def bounds(points: Points) -> tuple[float, float]:
    """Lowest and highest value to show: the first steep fall may leave the picture, so that the rest has room."""
    values = [value for _, value in points]
    later = values[len(values) // 10 :]
    low, high = min(values), max(later)
    margin = 0.05 * (high - low) or 0.01 * abs(high) or 0.01
    return low - margin, high + margin


def draw(points: Points, width: int, height: int, first: float, last: float, low: float, high: float) -> list[str]:
    """Rows of characters, from the top, with a line through `points`: (x, value), x rising from `first` to `last`.

    What lies above `high` or below `low` is left out; the line leaves and enters at the edge.
    """
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for column, value in enumerate(_columns(points, 2 * width, first, last)):
        if value is None:
            continue
        row = place(value, low, high, 4 * height)
        if low <= value <= high:
            step = 0 if before is None or before == row else 1 if before < row else -1
            for dot in range(row, before, -step) if before is not None and step else (row,):
                cells[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def place(value: float, low: float, high: float, count: int) -> int:
    """Which of `count` places from the top a value has; what is out of the picture stands at its edge."""
    share = (high - value) / (high - low)
    return min(count - 1, max(0, math.floor(share * count)))


def _columns(points: Points, width: int, first: float, last: float) -> list[float | None]:
    """The mean of the points of each column; between distant points, a straight line."""
    sums, counts = [0.0] * width, [0] * width
    for x, value in points:
        column = min(width - 1, int((x - first) / max(last - first, 1e-9) * (width - 1) + 0.5))
        sums[column] += value
        counts[column] += 1
    means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    known = [column for column, mean in enumerate(means) if mean is not None]
    for left, right in pairwise(known):
        start, end = means[left], means[right]
        assert start is not None
        assert end is not None
        for column in range(left + 1, right):
            means[column] = start + (end - start) * (column - left) / (right - left)
    return means
