"""How unevenly tokens fall on processes, by how unevenly they fall on experts. Torch-free."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from weft.plan.work import Num, Work

POWERS = range(21)
LARGEST = [NormalDist().inv_cdf((2**power - 0.375) / (2**power + 0.25)) for power in POWERS]
"""The largest of 1, 2, 4, … numbers drawn from a normal distribution, on average, in deviations (Blom 1958)."""


def largest_of(count: Num) -> Num:
    return np.interp(np.log2(count), POWERS, LARGEST)


def fullest(work: Work) -> Num:
    """Tokens of the process that has most for its experts, in even shares."""
    s = work.sizes
    if np.all(s.busiest == 1):
        return 1.0
    return fullest_share(s.busiest, s.experts, s.layers - s.dense_layers, work.cut.ep)


def fullest_share(busiest: Num, experts: Num, blocks: Num, ep: Num) -> Num:
    """The same of plain numbers. What experts are given is taken to be spread normally, one knowing nothing of the other,
    so that a process with many of them is nearer to the mean.

    Args:
        busiest: what the busiest expert of all blocks is given, in even shares.
        experts: of a block; `blocks`: that have some; `ep`: processes that they are dealt out to.
    """
    spread = (busiest - 1) / largest_of(np.maximum(2, experts * blocks))
    return 1 + spread * largest_of(ep) / np.sqrt(np.maximum(1, experts / ep))
