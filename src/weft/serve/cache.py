"""The paged key-value cache, and attention over it (Kwon et al., PagedAttention, 2023).

Keys and values of all sequences lie in one store for each layer, in blocks of a few tokens; a sequence's table says which
are its own. The model's code calls `PagedLayer.attend` where in training it attends: to the model a batch is one row of
tokens, and only here it is known where one sequence ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.models.attention import attend
from weft.models.shape import Shape
from weft.serve.batch import Batch
from weft.serve.config import EngineConfig
from weft.serve.store import STORES, Int8Store, Store

PADDING = 1.5
"""Sequences of one token each are attended to together if the longest has at most so many times the shortest's keys."""


@dataclass(frozen=True)
class Group:
    """Sequences of a batch that are attended to at once: either many with one token each, or one with many.

    Attributes:
        tokens: their places in the batch, [R·T]; None: all of them, in order.
        blocks: their tables, padded, [R, M]; of one sequence whose blocks lie in a row, the range of them.
        mask: who sees whom: 0 or -inf, [R, 1, T, M·block]; None: causal over just these tokens.
    """

    count: int
    tokens: Tensor | None
    blocks: Tensor | range
    mask: Tensor | None


class PagedLayer:
    """Keys and values of one layer. Implements models/attention.py's LayerCache."""

    def __init__(self, keys: Store | Int8Store, values: Store | Int8Store) -> None:
        self.keys, self.values = keys, values
        self.slots: Tensor
        self.groups: list[Group]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Keep k and v [1, K, N, E], and let q [1, H, N, E] look at all that its sequences have: [1, H, N, E]."""
        self.keys.put(self.slots, k[0].transpose(0, 1))
        self.values.put(self.slots, v[0].transpose(0, 1))
        if len(self.groups) == 1:
            return self._attend(self.groups[0], q, k, v, scale)
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        for group in self.groups:
            assert group.tokens is not None
            part_q, part_k, part_v = (x.index_select(2, group.tokens) for x in (q, k, v))
            y.index_copy_(2, group.tokens, self._attend(group, part_q, part_k, part_v, scale))
        return y

    def _attend(self, group: Group, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if group.mask is None:
            return attend(q, k, v, None, scale)
        keys, values = self.keys.take(group.blocks), self.values.take(group.blocks)
        if q.shape[2] > group.count:
            return attend(q, keys, values, group.mask, scale)
        # [1, H, R, E] → [R, K, H/K, E]: heads that share keys stand as tokens, so that no keys are repeated for them
        q = q.reshape(k.shape[1], -1, group.count, q.shape[3]).permute(2, 0, 1, 3)
        y = attend(q, keys, values, group.mask, scale)
        return y.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(0)


class PagedCache:
    """The stores of all layers that a process holds."""

    def __init__(
        self, shape: Shape, num_layers: int, heads: int, num_blocks: int, config: EngineConfig, like: Tensor
    ) -> None:
        """
        Args:
            heads: kv heads of this process.
            like: a tensor of the dtype and device.
        """
        store, block = STORES[config.cache_dtype], config.block_tokens
        self.num_blocks = num_blocks
        self.block, self.window, self.device, self.dtype = block, shape.sliding_window, like.device, like.dtype
        self.layers = [
            PagedLayer(*(store(num_blocks, block, heads, dim, like) for dim in (shape.head_dim, shape.value_dim)))
            for _ in range(num_layers)
        ]

    def begin(self, batch: Batch) -> None:
        """Make ready for a step: what all layers need to know, worked out once."""
        slots, groups = batch.slots.to(self.device), self._groups(batch)
        for layer in self.layers:
            layer.slots, layer.groups = slots, groups

    def _groups(self, batch: Batch) -> list[Group]:
        starts = batch.starts
        single = sorted((row for row, count in enumerate(batch.counts) if count == 1), key=batch.ends.__getitem__)
        groups: list[list[int]] = []
        for row in single:
            if groups and batch.ends[row] <= max(PADDING * batch.ends[groups[-1][0]], batch.ends[groups[-1][0]] + 64):
                groups[-1].append(row)
            else:
                groups.append([row])
        groups += [[row] for row, count in enumerate(batch.counts) if count > 1]
        if len(groups) == 1:
            rows = sorted(groups[0])
            return [self._group(batch, rows, None)]
        places = [[at for row in rows for at in range(starts[row], starts[row] + batch.counts[row])] for rows in groups]
        return [self._group(batch, rows, at) for rows, at in zip(groups, places, strict=True)]

    def _group(self, batch: Batch, rows: list[int], places: list[int] | None) -> Group:
        count, ends = batch.counts[rows[0]], [batch.ends[row] for row in rows]
        tokens = None if places is None else torch.tensor(places, device=self.device)
        if count == ends[0] > 1 and (self.window is None or self.window >= count):
            return Group(1, tokens, torch.empty(0), None)
        tables = [batch.tables[row] for row in rows]
        # blocks wholly behind the window are seen by nobody
        first = [0 if self.window is None else max(0, end - count + 1 - self.window) // self.block for end in ends]
        tables = [table[skip:] for table, skip in zip(tables, first, strict=True)]
        longest = max(map(len, tables))
        row = range(tables[0][0], tables[0][0] + longest)
        in_a_row = len(tables) == 1 and tables[0] == list(row)
        padded = [table + [self.num_blocks] * (longest - len(table)) for table in tables]
        blocks = row if in_a_row else torch.tensor(padded, device=self.device)
        skipped = torch.tensor([skip * self.block for skip in first], device=self.device)[:, None, None]
        query = torch.tensor(ends, device=self.device)[:, None, None] - count
        query = query + torch.arange(count, device=self.device)[None, :, None]
        key = skipped + torch.arange(longest * self.block, device=self.device)[None, None, :]
        hidden = key > query
        if self.window is not None:
            hidden |= query - key >= self.window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return Group(len(rows), tokens, blocks, mask.unsqueeze(1))
