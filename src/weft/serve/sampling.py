"""Sampling: how the next token is chosen from the logits."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a sequence ends.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: choose among this many most probable tokens (ties of the last one included); None: all.
        top_p: choose among the fewest tokens whose probabilities reach this sum (Holtzman et al., 2019); 1: all.
        seed: makes the choice repeatable; None: another one each time.
        max_tokens: new tokens of one sequence at most; the model's context ends it too.
        stop: texts that end a sequence; they are not part of the result.
        eos: ids that end a sequence.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (most probable token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or left out to choose among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if "" in self.stop:
            raise ValueError("a stop text is empty; it would end every sequence before it begins")


def sample(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """Logits [B, V] → token ids [B]. `draws`: a number in [0, 1) for each row; unused where temperature is 0.

    One draw a row, turned by the inverse of the cumulative distribution: a row depends on its own logits and draw.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # cumulative sums over a large vocabulary lose a rare token in fp32; MPS has nothing wider
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = warp(logits, sampling).to(wide).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.tensor(draws, dtype=wide, device=logits.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach the total
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] → fp32 [B, V] over the temperature, -inf where top-k, then top-p, leave a token out."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        last = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1)
        out = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        out[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))
    return logits


def random_stream(seed: int | None, prompt: Sequence[int], copy: int) -> random.Random:
    """The random numbers of one sequence: a function of the seed, its prompt's ids and how many equal prompts came
    before it; never of what else is in the batch, nor of the device."""
    if seed is None:
        return random.Random()
    key = hashlib.blake2b(f"{seed}:{copy}:".encode() + struct.pack(f"<{len(prompt)}q", *prompt), digest_size=8)
    return random.Random(int.from_bytes(key.digest(), "little"))
