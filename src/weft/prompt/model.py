"""Whom a prompt is put to: an OpenAI-compatible server, or a checkpoint in this process. Both do these things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from weft.prompt.file import PromptSampling
from weft.prompt.render import Message


@dataclass(frozen=True)
class Form:
    """What a text must look like, for a model that can be held to it."""

    kind: Literal["json_schema", "regex"]
    source: str


@dataclass(frozen=True)
class Ask:
    """A text to continue, or a conversation to answer, `n` times."""

    prompt: str | tuple[Message, ...]
    sampling: PromptSampling
    n: int = 1
    form: Form | None = None


@dataclass(frozen=True)
class Reply:
    """
    Attributes:
        texts: of each of the `n` completions.
        cut: of them, how many ended because there was no more room (`max_tokens`, or the model's context).
        seconds: from the ask to its last completion, beside whatever else was asked.
    """

    texts: tuple[str, ...]
    cut: int
    prompt_tokens: int
    new_tokens: int
    seconds: float


class Piece(NamedTuple):
    """Of a text that is read as it comes.

    Attributes:
        cut: it is the last one, because there was no more room (`max_tokens`, or the model's context).
    """

    text: str
    cut: bool = False


@dataclass(frozen=True)
class Likelihood:
    """How probable a model finds a text behind another.

    Attributes:
        logprob: of the whole text, in nats.
        tokens: that it has.
        greedy: each of them is the most probable one.
    """

    logprob: float
    tokens: int
    greedy: bool


class Model(Protocol):
    """Iterators give (index of what was asked, what came), in any order, as they come."""

    name: str

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        """Of each ask.

        Args:
            keep: what a server refuses of them is told when the others have been answered; else at once. A checkpoint in
                this process looks at all of them before it answers any.
        """
        ...

    def stream(self, ask: Ask) -> Iterator[Piece]:
        """The text of one completion."""
        ...

    def likelihoods(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        """Of each second text behind the first: of all tokens that have one of its characters."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """A vector for each text, [N, D]."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def logprobs(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Token ids → the log-probability of each token but the first."""
        ...

    @property
    def longest(self) -> int:
        """Tokens that `logprobs` can take at once."""
        ...

    def close(self) -> None: ...
