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
from weft.serve.batch import Batch
from weft.serve.cache import Group, PagedCache

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
        self.input = torch.zeros(sequences * (4 + blocks), dtype=torch.long, device=cache.device)
        self.tokens, self.positions, self.slots, self.skipped = self.input[: 4 * sequences].view(4, sequences)
        self.tables = self.input[4 * sequences :].view(sequences, blocks)
        # in a later stage of several, what the one before computed
        hidden = torch.zeros(1, sequences, model.shape.hidden, dtype=cache.dtype, device=cache.device)
        self.x = hidden if model.embed is None else self.tokens[None]

    def load(self, batch: Batch, x: Tensor) -> None:
        """Copy a batch of at most so many sequences, of at most so many blocks, into the buffers; `x` as Decoder.body."""
        missing, nowhere = self.sequences - len(batch.counts), self.cache.num_blocks  # the block of zeros
        behind = [self.cache.behind(end - 1) for end in batch.ends]
        tables = [table[skip:] for table, skip in zip(batch.tables, behind, strict=True)] + missing * [[self.scratch]]
        skipped = torch.tensor(behind) * self.cache.block
        rows = ((batch.tokens, 0), (batch.positions, 0), (batch.slots, self.scratch * self.cache.block), (skipped, 0))
        padded = [torch.cat((row, row.new_full((missing,), fill))) for row, fill in rows]
        table = torch.tensor([table + [nowhere] * (self.blocks - len(table)) for table in tables])
        self.input.copy_(torch.cat((*padded, table.flatten())))
        if self.model.embed is None:
            self.x[:, : x.shape[1]] = x

    def run(self) -> Tensor:
        """Hidden states behind all blocks, of padding too, [1, sequences, D]; of nothing but what lies in the buffers."""
        keys = self.skipped[:, None] + torch.arange(self.blocks * self.cache.block, device=self.input.device)
        hidden = keys > self.positions[:, None]
        if self.cache.window is not None:
            hidden |= self.positions[:, None] - keys >= self.cache.window
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        group = Group(self.sequences, None, self.tables, mask, adapter=0)
        for layer in self.cache.layers:
            layer.slots, layer.groups = self.slots, [group]
        return self.model.body(self.x, self.positions[None], caches=self.layers)


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
        self.pool: Any = None  # torch's word for a memory that graphs share

    def takes(self, batch: Batch) -> bool:
        """Whether it is a step of this kind: one token of each sequence, and its logits, by the model as it is."""
        return len(batch.rows) == len(batch.tokens) == len(batch.counts) and not any(batch.adapters)

    def __call__(self, batch: Batch, x: Tensor) -> Tensor:
        """As Decoder.body, [1, R, D], good until the next call."""
        sequences = size_above(len(batch.counts), 1, self.most_sequences)
        seen = [len(table) - self.cache.behind(end - 1) for table, end in zip(batch.tables, batch.ends, strict=True)]
        blocks = size_above(max(seen), FEWEST_BLOCKS, self.most_blocks)
        if (sequences, blocks) not in self.steps:
            step = self.make(sequences, blocks)
            step.load(batch, x)
            run = self.record(step) if step.input.device.type == "cuda" else step.run
            self.steps[sequences, blocks] = step, run
        step, run = self.steps[sequences, blocks]
        step.load(batch, x)
        return run()[:, : len(batch.counts)]

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
