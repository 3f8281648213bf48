"""Ways in which models write a call of a function. Torch-free.

None knows a model by its name: what stands around names and arguments is learnt from the model's template (`manner.py`).
Between the words of a mark there may be more or less space than in the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

Written = tuple[str, Any]
"""A call as a model wrote it: the function's name, and its arguments as a value, or as `Texts`."""

Found = tuple[list[Written], int]
"""Calls, and the length of the text that they are."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SPACE = re.compile(r"\s*")
KEY = re.compile(r"[^\s<>=\"]+")
DECODER = json.JSONDecoder()
NO_CALL: Found = ([], 0)


class Texts(dict[str, str]):
    """Arguments that are texts yet: what they mean is in the function's schema."""


class Way(Protocol):
    """A way of calling.

    Attributes:
        marks: texts, one of which begins a call; none: an answer that calls does nothing else.
        ends: what may follow upon a call, and says nothing.
    """

    @property
    def marks(self) -> tuple[str, ...]: ...

    @property
    def ends(self) -> tuple[str, ...]: ...

    def take(self, text: str, whole: bool) -> Found | None:
        """The call that a text begins with. None: it may become one, when more has come.

        Args:
            whole: no more comes.
        """


@dataclass(frozen=True)
class Objects:
    """Name and arguments are fields of a JSON object, or of several in a list (Hermes, Qwen, Llama 3, Mistral)."""

    marks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    name: str = "name"
    arguments: str = "arguments"

    def take(self, text: str, whole: bool) -> Found | None:
        wait = NO_CALL if whole else None
        start = skip(text, self.marks)
        if start == len(text):
            return wait
        if text[start] not in "{[":
            return NO_CALL
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return NO_CALL if any(end in text for end in self.ends if end[0] in "<[") else wait
        calls = list(self._read(value))
        return (calls, end) if calls and all(name for name, _ in calls) else NO_CALL

    def _read(self, value: Any) -> Iterator[Written]:
        for one in value if isinstance(value, list) else [value]:
            table = one if isinstance(one, dict) else {}
            name = table.get(self.name)
            key = next((key for key in (self.arguments, "arguments", "parameters") if key in table), None)
            yield (name if isinstance(name, str) else ""), table[key] if key else {}


@dataclass(frozen=True)
class Named:
    """A name, and its arguments as JSON behind it (DeepSeek, Kimi, newer Mistrals).

    Attributes:
        before: what stands before the name.
        between: what stands between name and arguments: its beginning, and its end where an id or a number is in it.
    """

    marks: tuple[str, ...]
    ends: tuple[str, ...]
    before: str
    between: tuple[str, str]

    def take(self, text: str, whole: bool) -> Found | None:
        wait = NO_CALL if whole else None
        named = after_mark(self, text)
        if named is None:
            return wait if may_become(text, self.marks) else NO_CALL
        start = text.find("{", named.end())
        if start < 0:
            return wait
        gap = squeezed(text[named.end() : start])
        first, last = (squeezed(part) for part in self.between)
        if not (gap.startswith(first) and gap.endswith(last)):
            return NO_CALL
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return wait
        return [(named[0], value)], end


@dataclass(frozen=True)
class Tagged:
    """A name, and then each argument's name and value with marks around them (Qwen3-Coder, GLM, MiniMax).

    Attributes:
        before: what stands before the function's name, and `behind`: behind it.
        key: what stands before an argument's name, `value`: before its value, and `close`: behind that.
        end: ends the call.
    """

    marks: tuple[str, ...]
    ends: tuple[str, ...]
    before: str
    behind: str
    key: str
    value: str
    close: str
    end: str

    def take(self, text: str, whole: bool) -> Found | None:
        wait = NO_CALL if whole else None
        named = after_mark(self, text)
        if named is None:
            return wait if may_become(text, self.marks) else NO_CALL
        at, arguments = matched(self.behind, text, named.end()), Texts()
        if at is None:
            return wait if may_become(text[named.end() :], (self.behind,)) else NO_CALL
        while (start := matched(self.key, text, at)) is not None:
            middle = loosely(self.value).search(text, start)
            last = loosely(self.close).search(text, middle.end()) if middle else None
            if middle is None or last is None:
                return wait
            key, written = text[start : middle.start()].strip(), text[middle.end() : last.start()]
            if not KEY.fullmatch(key):
                return NO_CALL
            arguments[key] = written.removeprefix("\n").removesuffix("\n")
            at = last.end()
        end = matched(self.end, text, at)
        return wait if end is None else ([(named[0], arguments)], end)


def after_mark(way: Named | Tagged, text: str) -> re.Match[str] | None:
    """The function's name, behind what begins a call."""
    opening = tuple(mark for mark in way.marks if mark != way.before.strip())
    start = matched(way.before, text, skip(text, opening))
    return None if start is None else NAME.match(text, start)


def skip(text: str, marks: Sequence[str]) -> int:
    """Where a text goes on behind space and marks."""
    at = unspaced(text, 0)
    while mark := next((mark for mark in marks if text.startswith(mark, at)), ""):
        at = unspaced(text, at + len(mark))
    return at


def matched(literal: str, text: str, at: int) -> int | None:
    """Where a text goes on behind a literal that stands at `at`, with any space around; None: it does not."""
    found = loosely(literal).match(text, unspaced(text, at))
    return None if found is None else found.end()


def unspaced(text: str, at: int) -> int:
    """Where a text goes on behind space."""
    found = SPACE.match(text, at)
    assert found is not None  # no space is enough
    return found.end()


@lru_cache(maxsize=256)
def loosely(literal: str) -> re.Pattern[str]:
    """A literal, with any space between its words."""
    return re.compile(r"\s*".join(re.escape(word) for word in literal.split()))


def squeezed(text: str) -> str:
    return "".join(text.split())


def may_become(text: str, literals: Sequence[str]) -> bool:
    """Whether a text is the beginning of one of these, or as much as one and a part of a name."""
    start = squeezed(text)
    return any(squeezed(one).startswith(start) or start.startswith(squeezed(one)) for one in literals)
