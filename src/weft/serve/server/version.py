"""One set of weights as it is served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from weft.models.shape import Shape
from weft.serve.desk import Desk
from weft.serve.server.chat import ChatTemplate
from weft.serve.server.words import Words


@dataclass(frozen=True, eq=False)
class Version:
    """One set of weights as it is served. What a request began with, it ends with: take `Hosted.current` once.

    Attributes:
        model: the name that it is asked for by: the model's, or an adapter's.
        desk: where its requests go.
        number: "1", "2", …: counts up with every set of weights that was taken.
        folder: the Hugging Face directory that they came from.
        words: its tokenizer; None: prompts are token ids, and there are no texts.
        template: of its chats; None: it has none.
        sampling: settings for whoever names none, which the model's makers advise.
        adapter: of the engine's, which all its requests have; None: the model as it is.
    """

    model: str
    number: str
    folder: Path
    desk: Desk
    words: Words | None
    template: ChatTemplate | None
    sampling: Mapping[str, float]
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def shape(self) -> Shape:
        return self.desk.about.shape

    @property
    def max_context(self) -> int:
        return self.desk.about.max_context

    @property
    def eos(self) -> tuple[int, ...]:
        return self.desk.about.eos

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`."""
        return f"weft-{self.number}"

    @property
    def headers(self) -> dict[str, str]:
        """That every answer of a model has."""
        return {"x-weft-version": self.number}

    def under(self, adapter: str) -> Self:
        """The same, with this adapter and by its name."""
        return replace(self, model=adapter, adapter=adapter)

    def need_words(self) -> Words:
        """
        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.words is None:
            raise ValueError("this model has no tokenizer.json: give prompts as token ids")
        return self.words
