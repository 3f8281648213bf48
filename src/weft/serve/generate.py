"""Generation: prompts in, one more token of each at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from weft.models.decoder import Decoder
from weft.serve.cache import KeyValues
from weft.serve.sampling import Sampling, random_stream, sample

FIRST_ROOM = 256  # new tokens that the cache has room for before it grows


def complete(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Token ids of prompts, of any lengths → the new token ids of each, the one of `sampling.eos` included."""
    completions: list[list[int]] = [[] for _ in prompts]
    for sequence, token in generate(model, prompts, sampling):
        completions[sequence].append(token)
    return completions


def generate(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, int]]:
    """As `complete`, one (index of the prompt, token id) at a time as they come."""
    batch = Generation(model, prompts, sampling)
    while batch.rows:
        yield from batch.step()


class Generation:
    """A batch of prompts on their way, padded on the left so that all of them end in the same column.

    Each gives the tokens that it would give alone: padding is seen by none, and positions count from a prompt's own
    first token. A sequence that ends leaves the batch. Texts of `sampling.stop` are the caller's: see `serve/text.py`.

    Raises:
        ValueError: a prompt is empty, or leaves no room for a token in the model's context (`shape.max_seq`).
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        check_prompts(prompts, model.shape.max_seq, model.shape.vocab)
        self.model, self.sampling = model, sampling
        self.device = next(model.parameters()).device
        self.room = [min(sampling.max_tokens, model.shape.max_seq - len(prompt)) for prompt in prompts]
        copies: Counter[tuple[int, ...]] = Counter()
        self.random = []
        for prompt in map(tuple, prompts):
            self.random.append(random_stream(sampling.seed, prompt, copies[prompt]))
            copies[prompt] += 1
        self.rows = list(range(len(prompts)))  # the prompt of each row
        self.tokens, self.padding = pad_left(prompts, self.device)  # the tokens that the model has not seen yet
        self.end = self.tokens.shape[1]  # columns up to the last of these
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        limit = self.end + max(self.room, default=0)
        self.caches = [KeyValues(min(limit, self.end + FIRST_ROOM), limit) for _ in model.blocks]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(index of the prompt, token id) of every row's next token. The first step reads the whole prompts."""
        ids = sample(self.logits(), self.sampling, self.draws())
        self.tokens = ids[:, None]
        self.end += 1
        new = list(zip(self.rows, ids.tolist(), strict=True))
        for index, _ in new:
            self.room[index] -= 1
        self.finish({index for index, token in new if not self.room[index] or token in self.sampling.eos})
        return new

    def logits(self) -> Tensor:
        """Logits of the token after the last column, [B, V]."""
        start = self.end - self.tokens.shape[1]
        columns = torch.arange(start, self.end, device=self.device)
        positions = (columns - self.padding[:, None]).clamp(min=0)
        window = self.model.shape.sliding_window
        mask = who_sees_whom(self.padding, self.padded, start, self.end, window)
        logits: Tensor = self.model(self.tokens, positions, caches=self.caches, mask=mask, last_only=True)
        return logits[:, -1]

    def draws(self) -> list[float]:
        """A number in [0, 1) for each row."""
        return [self.random[index].random() for index in self.rows] if self.sampling.temperature else []

    def finish(self, prompts: set[int]) -> None:
        """End these prompts' sequences: their rows leave the batch."""
        kept = [row for row, index in enumerate(self.rows) if index not in prompts]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[row] for row in kept]
        rows = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.tokens, self.padding = self.tokens[rows], self.padding[rows]
        for cache in self.caches:
            cache.keep(rows)


def check_prompts(prompts: Sequence[Sequence[int]], max_seq: int, vocab: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index + 1} is empty; give the model at least one token to continue")
        if len(prompt) >= max_seq:
            raise ValueError(
                f"prompt {index + 1} has {len(prompt)} tokens; the model's context holds {max_seq}, the new ones "
                "included: shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(
                f"prompt {index + 1} has a token outside the model's vocabulary of {vocab}: "
                "the tokenizer belongs to another model"
            )


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] that all end in the last column, and how many columns of padding come before each, [B]."""
    longest = max(map(len, prompts), default=0)
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), longest)
    return tokens, torch.tensor(padding, device=device)


def who_sees_whom(padding: Tensor, padded: bool, start: int, end: int, window: int | None) -> Tensor | None:
    """Mask of the tokens in columns `start` to `end` over all columns so far, bool [B, 1, end - start, end].

    None where the plain one says it all: causal among the columns of a whole prompt, everything for a single token.
    Padding sees itself, for a softmax over nothing is not a number.
    """
    if not padded and (start == 0 or end - start == 1) and (window is None or window >= end):
        return None
    query = torch.arange(start, end, device=padding.device)[:, None]
    key = torch.arange(end, device=padding.device)[None, :]
    seen = (key <= query) & (key >= padding[:, None, None])
    if window is not None:
        seen &= query - key < window
    return (seen | (key == query))[:, None]
