"""How long a matrix product takes: tiles, waves, the depth of the sum, and memory. Torch-free."""

from __future__ import annotations

import numpy as np

from weft.plan.time.constants import CONSTANTS as C
from weft.plan.work import Num

TILES = ((256, 128, 1.0), (128, 128, 0.94), (128, 64, 0.78), (64, 64, 0.55))
"""Rows, columns of the result that one SM makes at a time, and how well each keeps its tensor cores busy."""


def gemm_time(m: Num, n: Num, k: Num, rate: Num, sms: Num, hbm: Num, item: Num, result: Num = 2) -> Num:
    """Seconds of [m, k] @ [k, n].

    A result is made of tiles; `sms` tiles are a wave, and the last wave takes as long as a full one, but for what
    split-k or stream-k gives to the idle (`split`). A tile's sum starts with filling its buffers: as much as `depth`
    more of k. No product is faster than its operands can be read.

    Args:
        rate: FLOP/s of the best product there is.
        item, result: bytes of a number of the operands, of the result.
    """
    best: Num = np.inf
    for rows, columns, busy in TILES:
        waves = np.ceil(m / rows) * np.ceil(n / columns) / sms
        waves = waves + C.wave * (np.ceil(waves) - waves)
        best = np.minimum(best, waves * sms * 2 * rows * columns * (k + C.depth) / (rate * busy))
    return np.maximum(best, (item * (m * k + k * n) + result * m * n) / (C.hbm * hbm)) + C.kernel
