"""Whom the tests of prompts ask: a small model of random weights, and one that knows its answers by rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.prompt.model import Ask, Likelihood, Piece, Reply

SHAPE = Shape(family="llama", num_layers=2, hidden=32, num_heads=2, ffn=64, vocab=256, max_seq=256)


def save_tiny(path: Path) -> Path:
    """A Hugging Face directory: random weights, large enough that no two tokens are nearly tied; a token for each byte."""
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(path, SHAPE, torch.float32) as weights:
        for name, dims in stored_sizes(SHAPE).items():
            weights.write(Region.whole(name, dims), 0.3 * torch.randn(dims, generator=numbers) + ("norm" in name))
    alphabet = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Parity:
    """Knows whether a number is even, if it is told to look at the last digit, or shown at least two examples; else it
    says even. Remembers what it was asked."""

    name = "parity"
    longest = 100

    def __init__(self) -> None:
        self.asked: list[str] = []

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        for index, ask in reversed(list(enumerate(asks))):  # in any order
            assert isinstance(ask.prompt, str)
            self.asked.append(ask.prompt)
            if ask.prompt.endswith("is:"):  # asked for instructions
                yield (
                    index,
                    Reply(tuple(["", "Look at the last digit.", "Guess {{ this }}."] * ask.n)[: ask.n], 0, 9, 9, 0.1),
                )
                continue
            knows = "last digit" in ask.prompt or ask.prompt.count("Number") > 2
            number = int(ask.prompt.split()[-2])
            yield index, Reply((" odd" if knows and number % 2 else " even",) * ask.n, 0, 10, 1, 0.1)

    def stream(self, ask: Ask) -> Iterator[Piece]:
        yield Piece("even")

    def likelihoods(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        for index, (context, text) in enumerate(texts):
            self.asked.append(context)
            odd = int(context.split()[-2]) % 2
            yield index, Likelihood(-1.0 if text == (" odd" if odd else " even") else -1.2, 1, True)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text), 1.0] for text in texts])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def logprobs(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        for index, text in enumerate(texts):
            yield index, [-float(one) for one in text[1:]]

    def close(self) -> None: ...
