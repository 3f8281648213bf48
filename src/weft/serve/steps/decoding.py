"""Steps of one token a sequence, in fixed sizes: as a CUDA graph, such a step is one launch instead of a thousand.

A graph computes again what was recorded, from the same memory. So sequences, and the blocks of their tables, are padded to
the next of a few sizes; each size has buffers of its own, which a batch is copied into, and is recorded when it is first
needed. A row of padding is a sequence of one token, which it keeps in a block that no other has. What is padded and
what is recorded are apart: without a GPU the same step just runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.models.attention import LayerCache
from weft.models.decoder import Decoder
from weft.models.latent import LatentCache
from weft.serve.kernels.gpu_attention import Tiles
from weft.serve.steps.batch import Batch
from weft.serve.steps.cache import Group, PagedCache

FEWEST_BLOCKS = 8
"""Of a table, in the smallest size."""

WARMUPS = 2
"""Times that a step runs before it is recorded: libraries take their memory, kernels are compiled and chosen."""


class StaticStep:
    """A step of a fixed number of sequences, with a fixed number of blocks each.

    Args:
        layers: what the model's blocks are called with; those of `cache`, or around them.
        scratch: the block of the cache that padding writes to.
    """

    def __init__(
        self, model: Decoder, cache: PagedCache, layers: Sequence[LayerCache | LatentCache], scratch: int,
        sequences: int, blocks: int,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.layers, self.scratch = model, cache, layers, scratch
        self.sequences, self.blocks = sequences, blocks
        self.input = torch.zeros(5, sequences, dtype=torch.long, device=cache.device)
        self.tokens, self.positions, self.slots, self.skipped, self.lasts = self.input
        self.tables = torch.full((sequences, blocks), cache.num_blocks, device=cache.device)
        self.tiles = self.in_place() if cache.in_place else None
        # in a later stage of several, what the one before computed
        hidden = torch.zeros(1, sequences, model.shape.hidden, dtype=cache.dtype, device=cache.device)
        self.x = hidden if model.embed is None else self.tokens[None]

    def load(self, batch: Batch, x: Tensor, lasts: list[int] | None = None) -> None:
        """Copy a batch of at most so many sequences, of at most so many blocks, into the buffers; `x` as Decoder.body.

        Args:
            lasts: the last places that `advance` may take the sequences to; None: where they are.
        """
        missing, nowhere = self.sequences - len(batch.counts), self.cache.num_blocks  # the block of zeros
        behind = [self.cache.behind(end - 1) for end in batch.ends]
        tables = [table[skip:] for table, skip in zip(batch.tables, behind, strict=True)] + missing * [[self.scratch]]
        skipped, nowhere_at = torch.tensor(behind) * self.cache.block, self.scratch * self.cache.block
        ends = batch.positions if lasts is None else torch.tensor(lasts)
        rows = ((batch.tokens, 0), (batch.positions, 0), (batch.slots, nowhere_at), (skipped, 0), (ends, 0))
        self.input.copy_(torch.stack([torch.cat((row, row.new_full((missing,), fill))) for row, fill in rows]))
        # what lies behind a sequence's last block is masked, or with tiles not looked at
        width = max(map(len, tables)) if self.tiles is not None else self.blocks
        padded = torch.tensor([table + [nowhere] * (width - len(table)) for table in tables])
        self.tables[:, :width].copy_(padded)
        if self.model.embed is None:
            self.x[:, : x.shape[1]] = x

    def advance(self, tokens: Tensor) -> None:
        """Go on by a token of each sequence, [R]. One that is at its last place stays there, and writes nowhere."""
        block = self.cache.block
        self.tokens[: len(tokens)] = tokens
        ended = self.positions >= self.lasts
        self.positions += ~ended
        number = self.tables.gather(1, ((self.positions - self.skipped) // block)[:, None])[:, 0]
        self.slots.copy_(torch.where(ended, self.scratch * block, number * block + self.positions % block))

    def run(self) -> Tensor:
        """Hidden states behind all blocks, of padding too, [1, sequences, D]; of nothing but what lies in the buffers."""
        groups = [self.group()] if self.tiles is None else []
        if self.tiles is not None:
            self.tiles.ones[:, -1] = self.positions
        for layer in self.cache.layers:
            layer.slots, layer.groups, layer.tiles = self.slots, groups, self.tiles
        return self.model.body(self.x, self.positions[None], caches=self.layers)

    def in_place(self) -> Tiles:
        """Who looks at what, but for the places in the texts, which are the batch's."""
        each = torch.arange(self.sequences, device=self.cache.device)
        ones = torch.stack((each, each, torch.ones_like(each), each), dim=1)
        return Tiles(ones, ones[:0], self.tables, self.blocks * self.cache.block, self.cache.window)

    def group(self) -> Group:
        """The same with a mask."""
        keys = self.skipped[:, None] + torch.arange(self.blocks * self.cache.block, device=self.input.device)
        hidden = keys > self.positions[:, None]
        if self.cache.window is not None:
            hidden |= self.positions[:, None] - keys >= self.cache.window
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return Group(self.sequences, None, self.tables, mask, adapter=0)


class Decoding:
    """The steps of all sizes, each made when it is first needed.

    Args:
        model, cache, layers, scratch: as in StaticStep.
    """

    def __init__(
        self, model: Decoder, cache: PagedCache, layers: Sequence[LayerCache | LatentCache], scratch: int,
        most_sequences: int, most_blocks: int,
    ) -> None:  # fmt: skip
        self.cache, self.most_sequences, self.most_blocks = cache, most_sequences, most_blocks
        self.make = partial(StaticStep, model, cache, layers, scratch)
        self.steps: dict[tuple[int, int], tuple[StaticStep, Callable[[], Tensor]]] = {}
        self.last: tuple[StaticStep, Callable[[], Tensor], int]  # and of how many sequences
        self.pool: Any = None  # torch's word for a memory that graphs share

    def takes(self, batch: Batch) -> bool:
        """Whether it is a step of this kind: one token of each sequence, and its logits, by the model as it is."""
        return len(batch.rows) == len(batch.tokens) == len(batch.counts) and not any(batch.adapters)

    def __call__(self, batch: Batch, x: Tensor, lasts: list[int] | None = None) -> Tensor:
        """As Decoder.body, [1, R, D], good until the next call. `lasts` as StaticStep.load."""
        sequences = size_above(len(batch.counts), 1, self.most_sequences)
        seen = [len(table) - self.cache.behind(end - 1) for table, end in zip(batch.tables, batch.ends, strict=True)]
        blocks = size_above(max(seen), FEWEST_BLOCKS, self.most_blocks)
        if self.cache.in_place:  # what is not there takes no time
            blocks = self.most_blocks
        if (sequences, blocks) not in self.steps:
            step = self.make(sequences, blocks)
            step.load(batch, x, lasts)
            run = self.record(step) if step.input.device.type == "cuda" else step.run
            self.steps[sequences, blocks] = step, run
        step, run = self.steps[sequences, blocks]
        step.load(batch, x, lasts)
        self.last = step, run, len(batch.counts)
        return run()[:, : len(batch.counts)]

    def again(self, tokens: Tensor) -> Tensor:
        """The same sequences, a token further: as a call, with nothing copied from the CPU."""
        step, run, count = self.last
        step.advance(tokens)
        return run()[:, :count]

    def record(self, step: StaticStep) -> Callable[[], Tensor]:
        """The step as a CUDA graph. What it writes while it warms up is what it will write: the batch's own."""
        device = step.input.device
        with torch.cuda.device(device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARMUPS):
                    step.run()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # of other threads, which may serve other models, nothing is asked meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                hidden = step.run()
            self.pool = graph.pool()  # one memory for all sizes: of two graphs never more than one is at work

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def size_above(count: int, least: int, most: int) -> int:
    """The first of least, 2 · least, 4 · least … that is not below; never above `most`, which is one too."""
    size = least
    while size < count:
        size *= 2
    return min(size, max(most, count))
