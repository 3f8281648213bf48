"""The text of one completion, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from weft.serve.requests.request import Sampling
from weft.serve.requests.tokens import Detokenizer, StopTexts, Tokenizer

CONTEXT = 32
"""Tokens of the prompt that the first new one is decoded behind."""


class TextStream:
    """Between a sequence's tokens and what its reader sees: no character in parts, no stop text nor the start of one.

    Attributes:
        stopped_by: the stop text that came.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        self.words = Detokenizer(tokenizer, prompt[-CONTEXT:], sampling.special)
        self.stops = StopTexts(sampling.stop)
        self.stopped_by: str | None = None

    def push(self, token: int, number: int) -> str:
        """The text that became sure with this token, the `number`th new one."""
        text = self.words.push(token)
        if number < self.sampling.min_tokens:
            return text
        text, stop = self.stops.push(text)
        self.stopped_by = stop
        return text

    def close(self) -> str:
        """What was held back, now that no more comes."""
        return "" if self.stopped_by is not None else self.stops.held
