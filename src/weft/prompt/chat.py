"""A conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from weft.prompt.file import Prompt, Row
from weft.prompt.model import Ask, Model
from weft.prompt.render import Message, as_messages
from weft.whole import write_whole

COMMANDS = "/undo takes the last turn back, /reset begins anew, /save FILE writes the conversation, /quit ends"

CUT = "(cut off: --max-tokens are said, or the model's context is full, which /reset empties)"

Write = Callable[[str], None]


class Chat:
    """Turns so far, and what a line does to them.

    Attributes:
        ended: the person wants no more.
    """

    def __init__(self, model: Model, prompt: Prompt, values: Row | None = None) -> None:
        """
        Args:
            prompt: its instruction and examples stand before the first turn; a line is its question's `text`.
            values: more fields that its templates see.
        """
        self.model, self.prompt, self.values = model, prompt, values or {}
        self.ended = False
        self.turns: list[Message] = []

    @property
    def opening(self) -> tuple[Message, ...]:
        return as_messages(self.prompt, self.prompt.examples, self.values | {"text": ""})[:-1]

    def say(self, line: str, write: Write) -> None:
        """A line of the person's: a command, or a turn, whose answer is written as it comes. Interrupted, the turn is
        taken back."""
        if line.startswith("/"):
            write(self._obey(*line[1:].split(maxsplit=1)) + "\n")
            return
        turn = as_messages(self.prompt, (), self.values | {"text": line})[-1]
        asked = (*self.opening, *self.turns, turn)
        answer, cut = "", False
        for piece in self.model.stream(Ask(asked, self.prompt.sampling)):
            answer, cut = answer + piece.text, piece.cut
            write(piece.text)
        write(f"\n{CUT}\n" if cut else "\n")
        self.turns += [turn, {"role": "assistant", "content": answer.strip()}]

    def _obey(self, command: str = "", rest: str = "") -> str:
        if command == "quit":
            self.ended = True
            return "bye"
        if command == "reset":
            self.turns.clear()
            return "a new conversation"
        if command == "undo":
            del self.turns[-2:]
            return f"{len(self.turns) // 2} turns are left"
        if command == "save" and rest:
            text = json.dumps([*self.opening, *self.turns], indent=2, ensure_ascii=False) + "\n"
            try:
                write_whole(Path(rest), text)
            except OSError as error:  # the conversation goes on
                return f"{rest} cannot be written: {error.strerror}"
            return f"written: {rest}"
        return COMMANDS
