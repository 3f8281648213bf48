"""Stores: the numbers that a cache keeps for every token, in blocks, as they came or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Store:
    """K heads' vectors of E numbers for each token, in blocks.

    Args:
        parts: numbers that are of one magnitude, then those of another; they add up to E.
        like: a tensor of the dtype and device.
    """

    def __init__(self, num_blocks: int, block: int, heads: int, parts: Sequence[int], like: Tensor) -> None:
        # one more, which holds zeros for ever: what tables are padded with
        self.rows = like.new_zeros(num_blocks + 1, block, heads, sum(parts))

    @staticmethod
    def vector_bytes(parts: Sequence[int], dtype: torch.dtype) -> int:
        """What one vector takes."""
        return sum(parts) * dtype.itemsize

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
    """The same in 8 bits: each part of a vector is its largest magnitude / 127, in fp32, times whole numbers.

    Each is at most half such a step off. Keys and values take (E + 4) / 2E of bf16's memory: 0.52 for heads of 128.
    """

    def __init__(self, num_blocks: int, block: int, heads: int, parts: Sequence[int], like: Tensor) -> None:
        self.codes = Store(num_blocks, block, heads, parts, like.new_empty(0, dtype=torch.int8))
        self.scales = Store(num_blocks, block, heads, [1] * len(parts), like.new_empty(0, dtype=torch.float32))
        self.parts, self.dtype = list(parts), like.dtype

    @staticmethod
    def vector_bytes(parts: Sequence[int], dtype: torch.dtype) -> int:
        return sum(parts) + len(parts) * torch.float32.itemsize

    def put(self, slots: Tensor, x: Tensor) -> None:
        largest = torch.cat([part.abs().amax(-1, keepdim=True) for part in x.split(self.parts, dim=-1)], dim=-1)
        scales = (largest.float() / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        self.codes.put(slots, (x / self._spread(scales)).round_().to(torch.int8))
        self.scales.put(slots, scales)

    def take(self, blocks: Tensor | range) -> Tensor:
        return (self.codes.take(blocks) * self._spread(self.scales.take(blocks))).to(self.dtype)

    def _spread(self, scales: Tensor) -> Tensor:
        """[..., parts] → [..., E], or what broadcasts to it."""
        if len(self.parts) == 1:
            return scales
        ones = zip(scales.split(1, dim=-1), self.parts, strict=True)
        return torch.cat([scale.expand(*scale.shape[:-1], size) for scale, size in ones], dim=-1)


STORES: dict[str, type[Store] | type[Int8Store]] = {"auto": Store, "int8": Int8Store}
"""By EngineConfig.cache_dtype."""
