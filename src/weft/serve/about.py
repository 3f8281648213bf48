"""What never changes of an engine. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.requests.checks import check_request
from weft.serve.requests.request import Request


@dataclass(frozen=True)
class About:
    """What never changes of an engine, for whoever has no hand on it.

    Attributes:
        max_context: tokens that a prompt and its completion may have together.
        eos: ids that end a text, by the model's own settings.
        has_text: whether there is a tokenizer.
        device: as torch writes it.
        config: its settings.
    """

    shape: Shape
    max_context: int
    eos: tuple[int, ...]
    has_text: bool
    device: str
    config: EngineConfig

    def check(self, request: Request) -> None:
        """Whether this engine can take the request at all.

        Raises:
            ValueError: says what cannot be done, and what to change.
        """
        queue = self.config.max_waiting + self.config.max_sequences
        check_request(request, self.shape.vocab, self.max_context, queue, self.has_text, self.config.adapters)

    def check_all(self, requests: Iterable[Request]) -> None:
        """The same of several, naming the one that cannot be by its place, from 1."""
        for number, request in enumerate(requests, start=1):
            try:
                self.check(request)
            except ValueError as error:
                raise type(error)(f"prompt {number}: {error}") from error
