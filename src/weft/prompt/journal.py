"""Answers that are kept as they come, so that a command that breaks off is started again and goes on."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from weft.prompt.model import Ask, Likelihood, Model, Piece, Reply
from weft.whole import write_whole

T = TypeVar("T")


class Journal:
    """A model that is asked nothing which a file has its answer to. Each answer goes into the file before it is given, a
    line of JSON with a digest of what was asked, so that a kill costs no more than what is on its way.

    What is asked twice is answered twice: an answer of the file is given once.

    Attributes:
        held: answers that the file has.
        taken: of them, those that were given.
    """

    def __init__(self, model: Model, path: Path, who: Sequence[str]) -> None:
        """
        Args:
            path: the file, which may be there from before; made with the first answer.
            who: what tells this model from others: answers of others are not taken for its own.

        Raises:
            ValueError: the file is something else.
        """
        self.model, self.path, self.name = model, path, model.name
        self._who = list(who)
        self._known: dict[str, deque[Any]] = defaultdict(deque)
        lines = read_lines(path)
        for key, answer in lines:
            self._known[key].append(answer)
        self.held, self.taken = len(lines), 0

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        def read(kept: dict[str, Any]) -> Reply:
            return Reply(**kept | {"texts": tuple(kept["texts"])})

        return self._each("complete", asks, lambda left: self.model.complete(left, keep), read)

    def stream(self, ask: Ask) -> Iterator[Piece]:
        return self.model.stream(ask)

    def likelihoods(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        return self._each("likelihood", texts, self.model.likelihoods, lambda kept: Likelihood(**kept))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.embed(texts)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def logprobs(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        return self._each("logprobs", texts, self.model.logprobs, list)

    @property
    def longest(self) -> int:
        return self.model.longest

    def close(self) -> None:
        self.model.close()

    def _each(
        self, kind: str, things: Sequence[Any], ask: Callable[[Sequence[Any]], Iterator[tuple[int, T]]],
        read: Callable[[Any], T],
    ) -> Iterator[tuple[int, T]]:  # fmt: skip
        """What the file knows of these things, then what the model says of the others."""
        keys = [digest([*self._who, kind, thing]) for thing in things]
        left = []
        for index, key in enumerate(keys):
            if self._known[key]:
                self.taken += 1
                yield index, read(self._known[key].popleft())
            else:
                left.append(index)
        if not left:
            return
        try:
            with open_file(self.path) as file:
                for at, answer in ask([things[index] for index in left]):
                    file.write(
                        json.dumps({"asked": keys[left[at]], "answer": plain(answer)}, ensure_ascii=False) + "\n"
                    )
                    file.flush()
                    self.held += 1
                    yield left[at], answer
        except ValueError as error:
            if len(left) == len(things):
                raise
            raise ValueError(
                f"among the {len(left)} of {len(things)} that were not answered before: {error}"
            ) from error


def open_file(path: Path) -> TextIO:
    """
    Raises:
        ValueError: it cannot be written.
    """
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written, where answers are kept as they come: {error.strerror}") from None


def plain(thing: Any) -> Any:
    """A dataclass as JSON has it; all else as it is."""
    return asdict(thing) if isinstance(thing, Reply | Likelihood) else thing


def digest(thing: Any) -> str:
    text = json.dumps(thing, default=lambda ask: asdict(ask) | {"sampling": ask.sampling.model_dump()})
    return hashlib.sha256(text.encode()).hexdigest()


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """What was asked and answered; a last line that was cut off by a kill is taken out of the file.

    Raises:
        ValueError: the file is no journal.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        lines = [(line["asked"], line["answer"]) for line in map(json.loads, whole.split("\n")[:-1])]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} should hold answers of a command that broke off, and does not: move it away"
        ) from None
    if whole != text:
        write_whole(path, whole)
    return lines
