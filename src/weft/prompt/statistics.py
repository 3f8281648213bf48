"""How sure a score is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Of 95 % of a normal distribution."""

ROUNDS = 10_000


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): unlike the mean ± 2 standard errors, it stays inside of 0 and 1 and has
    a width where all or none are right."""
    share, z = right / count, Z * Z / count
    middle = (share + z / 2) / (1 + z)
    half = Z / (1 + z) * math.sqrt(share * (1 - share) / count + z / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; of a single value the error is not known."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return float(numbers.mean()), math.nan
    return float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers)))


def ratio_error(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Sum over weight of clusters, and its standard error: the values of a cluster go together, the clusters do not."""
    total, weight = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    ratio = float(total.sum() / weight.sum())
    if len(total) < 2:
        return ratio, math.nan
    residuals = total - ratio * weight
    count = len(total)
    return ratio, float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / weight.sum())


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of b - a over the same cases, and its 95 % interval: percentiles over cases drawn again (Efron, 1979)."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=ROUNDS)
    low, high = np.percentile(drawn @ values / len(differences), (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)
