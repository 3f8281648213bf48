"""The paged key-value cache, and attention over it (Kwon et al., PagedAttention, 2023).

Keys and values of all sequences lie in one store for each layer, in blocks of a few tokens; a sequence's table says which
are its own. The model's code calls `PagedLayer.attend` where in training it attends: to the model a batch is one row of
tokens, and only here it is known where one sequence ends and the next begins. Of latent attention one vector a token is
kept, which is all that keys and values of every head are made of: `LatentLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weft.models.attention import attend
from weft.models.latent import Look
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.kernels import gpu_attention
from weft.serve.kernels.gpu_attention import Tiles
from weft.serve.kernels.native import attends, paged_attention
from weft.serve.steps.batch import Batch
from weft.serve.steps.store import STORES, Int8Store, Store

PADDING = 1.5
"""Sequences of one token each are attended to together if the longest has at most so many times the shortest's keys."""


@dataclass(frozen=True)
class Group:
    """Sequences of a batch that are attended to at once: either many with one token each, or one with many.

    Attributes:
        tokens: their places in the batch, [R·T]; None: all of them, in order.
        blocks: their tables, padded, [R, M]; of one sequence whose blocks lie in a row, the range of them.
        mask: who sees whom: 0 or -inf, [R, 1, T, M·block]; None: causal over just these tokens.
        adapter: of all of them, where it matters to attention.
    """

    count: int
    tokens: Tensor | None
    blocks: Tensor | range
    mask: Tensor | None
    adapter: int


class Layer:
    """What one layer keeps, of all sequences.

    Attributes:
        slots: where the vectors of the step's tokens go, [N].
        groups: what of it looks at what.
        tiles: the same for the kernel that needs no groups, where it can be had.
    """

    slots: Tensor
    groups: list[Group]
    tiles: Tiles | None = None

    def each(self, how: Callable[..., Tensor], *row: Tensor) -> Tensor:
        """`how` of each group and its tokens' part of the row, [1, ·, N, ·]: as a row again."""
        if len(self.groups) == 1:
            return how(self.groups[0], *row)
        y: Tensor | None = None
        for group in self.groups:
            assert group.tokens is not None
            part = how(group, *(x.index_select(2, group.tokens) for x in row))
            y = part.new_empty(*part.shape[:2], len(self.slots), part.shape[3]) if y is None else y
            y.index_copy_(2, group.tokens, part)
        assert y is not None
        return y


class PagedLayer(Layer):
    """Keys and values of a layer's heads. Implements models/attention.py's LayerCache."""

    def __init__(self, keys: Store | Int8Store, values: Store | Int8Store) -> None:
        self.keys, self.values = keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Keep k and v [1, K, N, E], and let q [1, H, N, E] look at all that its sequences have: [1, H, N, E]."""
        if self.tiles is not None:
            assert isinstance(self.keys, Store)
            assert isinstance(self.values, Store)
            gpu_attention.keep(k, v, self.slots, self.keys.rows, self.values.rows)
            return gpu_attention.attend(q, self.keys.rows, self.values.rows, self.tiles, scale)
        self.keys.put(self.slots, k[0].transpose(0, 1))
        self.values.put(self.slots, v[0].transpose(0, 1))
        return self.each(partial(self._attend, scale), q, k, v)

    def _attend(self, scale: float | None, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group.mask is None:
            return attend(q, k, v, None, scale)
        single = q.shape[2] == group.count
        if single and isinstance(self.keys, Store) and isinstance(self.values, Store):
            rows = (self.keys.rows, self.values.rows)
            if attends(q, *rows):
                return paged_attention(q, *rows, group.blocks, group.mask, scale)
        keys, values = self.keys.take(group.blocks), self.values.take(group.blocks)
        if not single:
            return attend(q, keys, values, group.mask, scale)
        # [1, H, R, E] → [R, K, H/K, E]: heads that share keys stand as tokens, so that no keys are repeated for them
        q = q.reshape(k.shape[1], -1, group.count, q.shape[3]).permute(2, 0, 1, 3)
        y = attend(q, keys, values, group.mask, scale)
        return y.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(0)


class LatentLayer(Layer):
    """The vectors of latent attention, one a token, whatever the heads. Implements models/latent.py's LatentCache.

    Attributes:
        matrices: by adapter, the one that makes keys and values of a vector; empty: all have the model's own.
    """

    def __init__(self, vectors: Store | Int8Store) -> None:
        self.vectors = vectors
        self.matrices: dict[int, Tensor] = {}

    def attend(self, q: Tensor, latents: Tensor, look: Look) -> Tensor:
        """Keep latents [1, 1, N, C], and let q [1, H, N, E] look at all that its sequences have: [1, H, N, V]."""
        self.vectors.put(self.slots, latents[0].transpose(0, 1))
        return self.each(partial(self._attend, look), q, latents)

    def _attend(self, look: Look, group: Group, q: Tensor, latents: Tensor) -> Tensor:
        if group.mask is not None:
            latents = self.vectors.take(group.blocks)
        # [1, H, R·T, E] → [R, H, T, E]
        q = q[0].unflatten(1, (group.count, -1)).transpose(0, 1)
        y = look(q, latents, group.mask, self.matrices.get(group.adapter))
        return y.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def kept(shape: Shape, tp: int) -> tuple[int, list[tuple[int, ...]]]:
    """What a layer keeps of a token: for how many heads of this process, and the sizes of each vector's parts.

    Keys and values of heads are cut over tp. The vector that all heads' are made of is whole on every process.
    """
    if shape.latent is not None:
        return 1, [(shape.latent.kv_rank, shape.latent.rope_dim)]
    return shape.num_kv_heads // tp, [(shape.head_dim,), (shape.value_dim,)]


def token_bytes(shape: Shape, config: EngineConfig, dtype: torch.dtype) -> int:
    """Memory of one token in one layer, on each process of a tp axis."""
    heads, vectors = kept(shape, config.tp)
    return heads * sum(STORES[config.cache_dtype].vector_bytes(parts, dtype) for parts in vectors)


class PagedCache:
    """The stores of all layers that a process holds."""

    def __init__(
        self, shape: Shape, num_layers: int, tp: int, num_blocks: int, config: EngineConfig, like: Tensor
    ) -> None:
        """
        Args:
            like: a tensor of the dtype and device.
        """
        store, block = STORES[config.cache_dtype], config.block_tokens
        self.num_blocks = num_blocks
        self.block, self.window, self.device, self.dtype = block, shape.sliding_window, like.device, like.dtype
        heads, vectors = kept(shape, tp)
        layer = LatentLayer if shape.latent else PagedLayer
        self.layers: list[LatentLayer | PagedLayer] = [
            layer(*(store(num_blocks, block, heads, parts, like) for parts in vectors)) for _ in range(num_layers)
        ]
        kernel = gpu_attention.available(like.device, like.dtype)
        self.in_place = kernel and shape.latent is None and store is Store
        """Whether attention reads keys and values where they lie, whatever the batch."""
        self.group = shape.num_heads // shape.num_kv_heads

    @property
    def by_adapter(self) -> bool:
        """Whether sequences of different adapters cannot be attended to at once."""
        return any(isinstance(layer, LatentLayer) and layer.matrices for layer in self.layers)

    def behind(self, place: int) -> int:
        """Of a sequence's first blocks, how many its token at this place no longer sees: they lie behind the window."""
        if self.window is None or self.in_place:  # there nothing is read that is not seen
            return 0
        return max(0, place + 1 - self.window) // self.block

    def begin(self, batch: Batch) -> None:
        """Make ready for a step: what all layers need to know, worked out once."""
        slots = batch.slots.to(self.device)
        groups, tiles = ([], self._tiles(batch)) if self.in_place else (self._groups(batch), None)
        for layer in self.layers:
            layer.slots, layer.groups, layer.tiles = slots, groups, tiles

    def _tiles(self, batch: Batch) -> Tiles:
        ones, several = gpu_attention.make_tiles(batch.counts, batch.ends, self.group)
        width = max(map(len, batch.tables))
        tables = [table + [0] * (width - len(table)) for table in batch.tables]
        parts = [torch.tensor(rows).flatten() for rows in (ones, several, tables)]
        sizes = [len(part) for part in parts]
        on_device = torch.cat([part.long() for part in parts]).to(self.device).split(sizes)
        longest = max((end for count, end in zip(batch.counts, batch.ends, strict=True) if count == 1), default=0)
        fields = gpu_attention.FIELDS
        return Tiles(
            on_device[0].view(-1, fields),
            on_device[1].view(-1, fields),
            on_device[2].view(-1, width),
            longest,
            self.window,
        )

    def _groups(self, batch: Batch) -> list[Group]:
        starts = batch.starts
        adapters, ends = batch.adapters if self.by_adapter else [0] * len(batch.counts), batch.ends
        single = [row for row, count in enumerate(batch.counts) if count == 1]
        groups: list[list[int]] = []
        for row in sorted(single, key=lambda row: (adapters[row], ends[row])):
            first = groups[-1][0] if groups else row
            near = ends[row] <= max(PADDING * ends[first], ends[first] + 64)
            if groups and adapters[row] == adapters[first] and near:
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
        count, adapter, ends = batch.counts[rows[0]], batch.adapters[rows[0]], [batch.ends[row] for row in rows]
        tokens = None if places is None else torch.tensor(places, device=self.device)
        if count == ends[0] > 1 and (self.window is None or self.window >= count):
            return Group(1, tokens, torch.empty(0), None, adapter)
        tables = [batch.tables[row] for row in rows]
        # blocks wholly behind the window are seen by nobody
        first = [self.behind(end - count) for end in ends]
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
        return Group(len(rows), tokens, blocks, mask.unsqueeze(1), adapter)
