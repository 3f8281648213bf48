"""A prompt put to a model for every row of a labelled set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.prompt.examples import Examples
from weft.prompt.file import Prompt, Row
from weft.prompt.model import Ask, Model, Reply
from weft.prompt.output import form_of, is_right, label_of, problem, settle
from weft.prompt.render import as_messages, as_text, check_templates, render
from weft.prompt.statistics import wilson

Progress = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Answer:
    """What came of one question.

    Attributes:
        answer: what was read, or voted for; None: no sample had the right form.
        malformed: samples that had not.
    """

    answer: str | None
    malformed: int
    reply: Reply


@dataclass(frozen=True)
class Scored:
    """
    Attributes:
        right: of each row, in the order of the rows.
        seconds: in which all were answered, together.
    """

    prompt: Prompt
    answers: tuple[Answer, ...]
    labels: tuple[str, ...]
    right: tuple[bool, ...]
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.right), len(self.right))

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.reply.prompt_tokens for answer in self.answers)

    @property
    def new_tokens(self) -> int:
        return sum(answer.reply.new_tokens for answer in self.answers)


def make_asks(prompt: Prompt, rows: Sequence[Row], model: Model | None = None) -> list[Ask]:
    """What is asked for each row, with its examples.

    Raises:
        ValueError: a row cannot be asked; or examples go by embeddings, and no model is there to make them.
    """
    examples = Examples(prompt, model.embed if model else None)
    form, ways = form_of(prompt.output), (as_messages if prompt.chat else as_text)
    return [
        Ask(ways(prompt, examples.choose(render(prompt, "question", row)), row), prompt.sampling, prompt.output.votes, form)
        for row in rows
    ]  # fmt: skip


def ask(
    prompt: Prompt, rows: Sequence[Row], model: Model, progress: Progress = quiet, came: dict[int, Answer] | None = None
) -> tuple[list[Answer], float]:  # fmt: skip
    """The model's answers to rows, which need no labels; and the seconds that they took together.

    Args:
        came: gets each answer by its row's number as it comes: what is there if it ends with an error.
    """
    asks = make_asks(prompt, rows, model)
    found = came if came is not None else {}
    start = time.perf_counter()
    for index, reply in model.complete(asks, keep=came is not None):
        malformed = sum(problem(prompt.output, text) is not None for text in reply.texts)
        found[index] = Answer(settle(prompt.output, reply.texts), malformed, reply)
        progress(prompt.id, len(found), len(rows))
    return [found[index] for index in range(len(rows))], time.perf_counter() - start


def check(prompt: Prompt, rows: Sequence[Row]) -> None:
    """See to it that a prompt can be put to all rows, and that each has a right answer: of several prompts the last would
    else be looked at when the others have been paid for.

    Raises:
        ValueError: as `render`, or as `label_of`.
    """
    check_templates(prompt, rows)
    for row in rows:
        label_of(prompt, row)


def score(prompt: Prompt, rows: Sequence[Row], model: Model, progress: Progress = quiet) -> Scored:
    """
    Raises:
        ValueError: a row lacks a field or a label, before anything is asked; or the model cannot be asked.
    """
    labels = [label_of(prompt, row) for row in rows]
    answers, seconds = ask(prompt, rows, model, progress)
    right = [is_right(prompt.output, one.answer, label) for one, label in zip(answers, labels, strict=True)]
    return Scored(prompt, tuple(answers), tuple(labels), tuple(right), seconds)
