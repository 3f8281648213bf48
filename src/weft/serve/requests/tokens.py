"""Tokens back to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the bytes of an incomplete character


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that text is made with."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def to_str(self) -> str: ...


class Detokenizer:
    """The text of one sequence, token by token: what `push` returns, joined, is the text of all tokens.

    A character may be spread over several tokens (byte-level BPE, byte fallback): its bytes are held back until it is
    whole, so a text cut off inside a character ends before it. Tokens are decoded behind the ones before, the prompt's
    at first: some tokenizers drop the space of a text's first word. Only the tokens since the last clean end are kept,
    so the work for a token does not grow with the text.

    Args:
        special: special tokens are written out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), special: bool = False) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._context(list(prompt))

    def _context(self, ids: list[int]) -> None:
        self.ids, self.num_context = ids, len(ids)
        self.shown = len(self._text())  # characters of the text of `ids` that are out

    def push(self, token: int) -> str:
        """The text that became sure with this token: mostly a word, sometimes nothing."""
        self.ids.append(token)
        text = self._text()
        sure = len(text.rstrip(BROKEN))
        if sure <= self.shown:
            return ""
        new = text[self.shown : sure]
        if sure == len(text):
            self._context(self.ids[self.num_context :])
        else:
            self.shown = sure
        return new

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=not self.special)


class StopTexts:
    """Cuts a text that comes in pieces before the first stop text; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can go out, and the stop text that came."""
        held = self.held + text
        found = [(at, stop) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            self.held = ""
            at, stop = min(found)
            return held[:at], stop
        size = max((begun(held, stop) for stop in self.stops), default=0)
        self.held = held[len(held) - size :]
        return held[: len(held) - size], None


def begun(text: str, mark: str) -> int:
    """Characters at the text's end that may be the start of the mark."""
    return next((size for size in range(min(len(mark), len(text)), 0, -1) if mark.startswith(text[-size:])), 0)
