"""Runner: a model with its cache computes batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weft.models.attention import LayerCache
from weft.models.decoder import Decoder
from weft.models.latent import LatentCache
from weft.serve.config import EngineConfig
from weft.serve.cut.ranks import Order, Ranks
from weft.serve.kernels.joined import join
from weft.serve.kernels.pages import into_huge_pages
from weft.serve.kernels.products import quicken
from weft.serve.steps.adapters import Adapters
from weft.serve.steps.batch import Batch
from weft.serve.steps.cache import LatentLayer, PagedCache, token_bytes
from weft.serve.steps.decoding import Decoding
from weft.serve.steps.stack import Stack, stackable

PIECE = 64
"""Rows of logits that are there at once: with a vocabulary of 150,000, 38 MB."""

CPU_BYTES = 1 << 30


class Runner:
    """The model on this process, whole or a share of it.

    Args:
        ranks: the processes that the model is cut over; each runs every batch. None: it is whole.
    """

    def __init__(self, model: Decoder, num_blocks: int, config: EngineConfig, ranks: Ranks | None = None) -> None:
        first = next(iter(model.parameters()))
        self.model, self.device, self.ranks = model, first.device, ranks
        self.empty = first.detach().new_empty
        if self.device.type == "cpu":
            quicken(model)
            into_huge_pages(model)
        elif not config.adapters:  # which add to each matrix alone
            join(model)
        folders = {name: Path(folder) for name, folder in config.adapters.items()}
        self.adapters = Adapters(model, folders, ranks.tp_group if ranks else None)
        tp = ranks.tp if ranks else 1
        # where compiled, one block more, which no sequence gets: see serve/steps/decoding.py
        self.scratch = num_blocks
        room = num_blocks + bool(config.compile)
        self.cache = PagedCache(model.shape, len(model.blocks), tp, room, config, first.detach())
        for name, layer in zip(model.blocks, self.cache.layers, strict=True):
            if isinstance(layer, LatentLayer):
                layer.matrices = self.adapters.matrices(f"blocks.{name}.attention.kv")

        self.stack = Stack(model, self.cache) if not config.compile and stackable(model, self.cache) else None
        self.layers: Sequence[LayerCache | LatentCache] = self.cache.layers
        self.decoding: Decoding | None = None
        if config.compile:
            from weft.serve.steps.compiled import compile_step

            self.layers = compile_step(model, self.cache.layers)
            if self.device.type == "cuda" and model.shape.experts is None:  # which are counted on the CPU
                self.decoding = self.in_fixed_sizes(config)
            self.warm_up()

    def in_fixed_sizes(self, config: EngineConfig) -> Decoding:
        """Steps of one token a sequence."""
        longest = min(config.max_context or self.model.shape.max_seq, self.model.shape.max_seq)
        most = -(-longest // config.block_tokens)
        return Decoding(self.model, self.cache, self.layers, self.scratch, config.max_sequences, most)

    def warm_up(self) -> None:
        """Compile now, not when somebody waits: one token, and more, of a sequence that nobody has."""
        for count in (1, 2):
            some, slots = torch.arange(count), torch.full((count,), self.scratch * self.cache.block)
            table = count * [self.scratch]
            for _ in self.compute(Batch(some * 0, some, slots, [count], [count], [table], [0], some[:0])):
                pass

    def run(self, batch: Batch) -> Iterator[Tensor]:
        """Compute a batch; the logits of its `rows`, [≤ PIECE, V] at a time, in order. To be drained.

        The first of several processes tells the others, and has the whole logits; they have their shares.
        """
        if self.ranks is not None and self.ranks.index == 0:
            self.ranks.send(Order.RUN, batch.pack())
        yield from self.compute(batch)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Iterator[Tensor]:
        """As `run`, where all processes know the batch."""
        x = batch.tokens.to(self.device)[None]
        if self.ranks is not None and self.model.embed is None:
            x = self.ranks.take_over(self.empty(1, len(batch.tokens), self.model.shape.hidden))
        x = self._body(x, batch)
        if self.ranks is not None and self.model.head is None:
            self.ranks.hand_on(x)
        for rows in batch.rows.to(self.device).split(PIECE) if len(batch.rows) else ():
            yield self._logits(x, rows)

    @torch.inference_mode()
    def several(self, batch: Batch, lasts: list[int], choose: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """Steps of one token a sequence, one after the other, and nothing is asked of the CPU: the tokens, [R] each.

        Args:
            batch: of the first, with blocks for all.
            lasts: the place of each sequence's last token; the others go on until all are there.
            choose: logits [R, V], and the number of the step → tokens [R], on the device.
        """
        assert self.decoding is not None
        assert self.model.norm is not None
        assert self.model.head is not None
        self.adapters.begin(batch)
        x = batch.tokens.to(self.device)[None]
        chosen: list[Tensor] = []
        for step in range(1 + max(last + 1 - end for last, end in zip(lasts, batch.ends, strict=True))):
            hidden = self.decoding.again(chosen[-1]) if step else self.decoding(batch, x, lasts)
            chosen.append(choose(self.model.head(self.model.norm(hidden))[0], step))
        return chosen

    def _body(self, x: Tensor, batch: Batch) -> Tensor:
        """As Decoder.body, in the way that is the fastest for such a batch."""
        self.adapters.begin(batch)
        if self.decoding is not None and self.decoding.takes(batch):
            return self.decoding(batch, x)
        positions = batch.positions.to(self.device)[None]
        if self.stack is not None and self.stack.takes(batch):
            return self.stack(self.model.enter(x, positions), batch)
        self.cache.begin(batch)
        return self.model.body(x, positions, caches=self.layers)

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Of these rows of x [1, N, D]: [W, V]; on a process that neither computes nor gets them, nothing."""
        vocab = self.model.shape.vocab
        if self.model.norm is not None and self.model.head is not None:
            logits: Tensor = self.model.head(self.model.norm(x[:, rows]))[0]
            return logits if self.ranks is None else self.ranks.gather(logits, vocab)
        assert self.ranks is not None
        like = self.empty(len(rows) if self.ranks.index == 0 else 0, vocab)
        return self.ranks.gathered(like) if self.ranks.index == 0 else like

    @torch.inference_mode()
    def embed(self, tokens: list[int], adapter: int) -> Tensor:
        """The mean of the hidden states behind the last norm, [D] in fp32, beside the cache; on the first process."""
        row = torch.tensor([adapter, *tokens])
        if self.ranks is not None and self.ranks.index == 0:
            self.ranks.send(Order.EMBED, row)
        self.adapters.use(adapter)
        x, positions = row[1:].to(self.device)[None], torch.arange(len(tokens), device=self.device)
        if self.ranks is not None and self.model.embed is None:
            x = self.ranks.take_over(self.empty(1, len(tokens), self.model.shape.hidden))
        x = self.model.body(x, positions)
        if self.model.norm is not None:
            mean: Tensor = self.model.norm(x)[0].float().mean(dim=0)
            return mean if self.ranks is None else self.ranks.tell_first(mean)
        assert self.ranks is not None
        self.ranks.hand_on(x)
        like = x.new_empty(self.model.shape.hidden, dtype=torch.float32)
        return self.ranks.gathered(like) if self.ranks.index == 0 else like


def num_blocks(model: Decoder, config: EngineConfig, max_context: int) -> int:
    """Blocks of the cache that the settings give; `model` is this process's share.

    Raises:
        ValueError: not one.
    """
    first = next(iter(model.parameters()))
    one = config.block_tokens * len(model.blocks) * token_bytes(model.shape, config, first.dtype)
    most = config.max_sequences * -(-max_context // config.block_tokens)
    if config.cache_tokens is not None:
        count = config.cache_tokens // config.block_tokens
    else:
        count = min(most, (config.cache_bytes or free_bytes(first.device, config.gpu_share)) // one)
    if count < 1:
        if config.cache_tokens is not None:
            said = "cache_tokens (--cache-tokens)"
        else:
            said = "cache_bytes" if config.cache_bytes else "gpu_share (--gpu-share), or end what else is on this GPU"
        raise ValueError(
            f"the cache has no room for one block of {config.block_tokens} tokens ({one} bytes): raise {said}"
        )
    return count


def free_bytes(device: torch.device, gpu_share: float) -> int:
    """Memory for the cache where the settings leave it open. The weights are there already."""
    if device.type != "cuda":
        return CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1 - gpu_share) * total))
