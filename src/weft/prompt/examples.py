"""Which examples are shown before a question."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from weft.prompt.file import Prompt, Row
from weft.prompt.render import render

PLACES = 4096
"""Dims of a text's vector of words: words that fall on one by chance are taken for one."""

Embed = Callable[[Sequence[str]], np.ndarray]


class Examples:
    """Chooses a prompt's examples, the same ones for the same question whatever was asked before.

    An example whose question is the very one that is asked is left out: it would give the answer away.

    - first: as they stand in the file.
    - random: drawn anew for each question, by the seed and the question itself.
    - similar: those whose questions are most like it, the most alike last, next to it (Liu et al., 2022).
    - diverse: each the farthest from those before it (Gonzalez, 1985), beginning with the most ordinary one.
    """

    def __init__(self, prompt: Prompt, embed: Embed | None = None) -> None:
        """
        Args:
            embed: texts to vectors [N, D], for a prompt that chooses by embeddings.

        Raises:
            ValueError: it asks for more examples than it has.
        """
        self.prompt, self.shots, self.pool = prompt, prompt.shots, prompt.examples
        self.count = len(self.pool) if self.shots.count is None else self.shots.count
        if self.count > len(self.pool):
            raise ValueError(
                f"prompt {prompt.name}: shots.count is {self.count}, but there are {len(self.pool)} examples"
            )
        self.embed: Embed
        self.questions = [render(prompt, "question", row) for row in self.pool]
        if self.shots.select in ("similar", "diverse") and self.count:
            if self.shots.by == "words":
                self.embed = Words(self.questions)
            elif embed is None:
                raise ValueError(f"prompt {prompt.name}: shots.by is embeddings: a model is needed to choose examples")
            else:
                self.embed = unit(embed)
            self.vectors = self.embed(self.questions)
        if self.shots.select == "diverse" and self.count:
            spare = max(Counter(self.questions).values())
            self.order = list(islice(farthest_first(self.vectors), self.count + spare))

    def choose(self, question: str) -> list[Row]:
        """The examples for a question, in the order in which they stand."""
        order = self._order(question) if self.count else []
        chosen = list(islice((index for index in order if self.questions[index] != question), self.count))
        if self.shots.select == "similar":
            chosen.reverse()
        return [self.pool[index] for index in chosen]

    def _order(self, question: str) -> Sequence[int]:
        match self.shots.select:
            case "first":
                return range(len(self.pool))
            case "random":
                numbers = np.random.default_rng([self.shots.seed, *question.encode()])
                return numbers.permutation(len(self.pool)).tolist()
            case "similar":
                return np.argsort(-(self.vectors @ self.embed([question])[0]), kind="stable").tolist()
            case "diverse":
                return self.order


class Words:
    """Vectors of length 1 from the words of texts: term frequency × inverse document frequency, with the frequencies
    of the texts that it was made with."""

    def __init__(self, texts: Sequence[str]) -> None:
        seen = np.zeros(PLACES, dtype=np.float32)
        for text in texts:
            seen[list(set(self._places(text)))] += 1
        self.rarity = np.log((1 + len(texts)) / (1 + seen)) + 1

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), PLACES), dtype=np.float32)
        for row, text in enumerate(texts):
            np.add.at(vectors[row], self._places(text), 1)
        return normalized(vectors * self.rarity)

    def _places(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % PLACES for word in re.findall(r"\w+", text.casefold())]


def unit(embed: Embed) -> Embed:
    return lambda texts: normalized(np.asarray(embed(texts), dtype=np.float32))


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def farthest_first(vectors: np.ndarray) -> Iterator[int]:
    """Indices of vectors [N, D]: the nearest to the mean, then always the one whose nearest chosen one is farthest."""
    closeness = np.full(len(vectors), -np.inf)
    index = int(np.argmax(vectors @ vectors.mean(axis=0)))
    for _ in range(len(vectors)):
        yield index
        closeness = np.maximum(closeness, vectors @ vectors[index])
        closeness[index] = np.inf
        index = int(np.argmin(closeness))
