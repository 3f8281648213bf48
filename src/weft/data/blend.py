"""Which data set a sample comes from: fixed proportions, in a shuffled order that is computed, not stored."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from weft.data.order import Permutation, key

BLOCK = 4096  # samples in which every data set has exactly its share


class Blend:
    """Sample number → (data set, number within it), a pure function of (seed, sample).

    In every block of 4096 samples data set d fills exactly `quotas[d]` places (largest remainder), shuffled by
    (seed, block); within a data set numbers are used once each, block after block. One data set alone keeps its order.

    Args:
        weights: share of the samples for every data set; any positive numbers.

    Raises:
        ValueError: a weight is not positive or too small to give a sample in a block.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str], seed: int) -> None:
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights for {len(names)} data paths: give one weight for each path")
        for name, weight in zip(names, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {name} is {weight}; it must be above 0 (leave the path out instead)")
        self.seed = seed
        self.quotas = _largest_remainder(weights)
        for name, weight, quota in zip(names, weights, self.quotas, strict=True):
            if quota == 0:
                raise ValueError(
                    f"the weight of {name}, {weight} of {sum(weights):g}, is less than one sample in {BLOCK}: raise it"
                )
        self._edges = np.cumsum([0, *self.quotas])
        self._order = functools.lru_cache(maxsize=4)(lambda block: Permutation(BLOCK, key("blend", self.seed, block)))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] sample numbers → [n] data sets, [n] numbers within the data set; int64."""
        if len(self.quotas) == 1:
            return np.zeros_like(samples), samples
        blocks = samples // BLOCK
        places = np.empty_like(samples)
        for block in np.unique(blocks):
            here = blocks == block
            places[here] = self._order(int(block))(samples[here] % BLOCK)
        sets = np.searchsorted(self._edges, places, side="right") - 1
        return sets, blocks * np.array(self.quotas)[sets] + places - self._edges[sets]


def _largest_remainder(weights: Sequence[float]) -> list[int]:
    """BLOCK places shared out by weight; the last places go to the largest remainders, ties to the first."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda d: quotas[d] - exact[d])
    for d in by_remainder[: BLOCK - sum(quotas)]:
        quotas[d] += 1
    return quotas
