"""Stores: the numbers that a cache keeps for every token, in blocks, as they came or in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor


class Store:
    """K heads' vectors of E numbers for each token, in blocks.

    Args:
        like: a tensor of the dtype and device.
    """

    def __init__(self, num_blocks: int, block: int, heads: int, dim: int, like: Tensor) -> None:
        # one more, which holds zeros for ever: what tables are padded with
        self.rows = like.new_zeros(num_blocks + 1, block, heads, dim)

    @staticmethod
    def vector_bytes(dim: int, dtype: torch.dtype) -> int:
        """What one vector takes."""
        return dim * dtype.itemsize

    def put(self, slots: Tensor, x: Tensor) -> None:
        """Keep x [N, K, E] at slots [N]: block · block size + place in it."""
        self.rows.flatten(0, 1).index_copy_(0, slots, x)

    def take(self, blocks: Tensor | range) -> Tensor:
        """Of tables [R, M]: [R, K, M·block, E]; of a range, of one sequence: a view."""
        if isinstance(blocks, range):
            return self.rows[blocks.start : blocks.stop].flatten(0, 1).transpose(0, 1).unsqueeze(0)
        rows = self.rows.index_select(0, blocks.flatten())
        return rows.view(len(blocks), -1, *self.rows.shape[2:]).transpose(1, 2)


class Int8Store:
    """The same in 8 bits: a vector is its largest magnitude / 127, in fp32, times whole numbers.

    Each is at most half such a step off. Keys and values take (E + 4) / 2E of bf16's memory: 0.52 for heads of 128.
    """

    def __init__(self, num_blocks: int, block: int, heads: int, dim: int, like: Tensor) -> None:
        self.codes = Store(num_blocks, block, heads, dim, like.new_empty(0, dtype=torch.int8))
        self.scales = Store(num_blocks, block, heads, 1, like.new_empty(0, dtype=torch.float32))
        self.dtype = like.dtype

    @staticmethod
    def vector_bytes(dim: int, dtype: torch.dtype) -> int:
        return dim + torch.float32.itemsize

    def put(self, slots: Tensor, x: Tensor) -> None:
        scales = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        self.codes.put(slots, (x / scales).round_().to(torch.int8))
        self.scales.put(slots, scales)

    def take(self, blocks: Tensor | range) -> Tensor:
        return (self.codes.take(blocks) * self.scales.take(blocks)).to(self.dtype)


STORES: dict[str, type[Store] | type[Int8Store]] = {"auto": Store, "int8": Int8Store}
"""By EngineConfig.cache_dtype."""
