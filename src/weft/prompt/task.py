"""A task as a small file: a prompt, labelled rows, and how an answer is found: generated, or chosen by probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from weft.config.load import explain, read_toml
from weft.prompt.examples import Examples
from weft.prompt.file import Prompt, Row, Section, make_prompt, read_prompt, read_rows
from weft.prompt.model import Likelihood, Model
from weft.prompt.render import as_text, check_templates, render
from weft.prompt.score import Progress, check, quiet, score
from weft.prompt.statistics import mean_error


class TaskFile(Section):
    name: str
    kind: Literal["generate", "choices"] = "generate"
    data: str = Field(description="labelled rows, JSON lines; a path beside the task's own")
    prompt: str | dict[str, Any] = Field(description="a prompt file beside the task's own, or a prompt as a table")
    choices: tuple[str, ...] | str = Field((), description="the choices, or the field of a row that lists its own")
    label: str = Field("label", description="for choices: the field that holds the right one, or its number from 0")

    @model_validator(mode="after")
    def _choices(self) -> Self:
        if (self.kind == "choices") != bool(self.choices):
            raise ValueError('choices: set them where kind = "choices", and only there')
        return self


@dataclass(frozen=True)
class Task:
    file: TaskFile
    prompt: Prompt
    rows: list[Row]


@dataclass(frozen=True)
class Measure:
    """A figure of a model, and its standard error."""

    what: str
    metric: str
    value: float
    error: float
    count: int
    unit: str = "rows"


def read_task(path: Path) -> Task:
    """
    Raises:
        ValueError: the file, its prompt or its data are missing or malformed; names the setting.
    """
    try:
        file = TaskFile.model_validate(read_toml(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, TaskFile)}") from None
    if isinstance(file.prompt, str):
        prompt = read_prompt(path.parent / file.prompt)
    else:
        prompt = make_prompt({"name": file.name} | file.prompt, path)
    if file.kind == "choices" and (prompt.chat or not prompt.answer):
        raise ValueError(
            f"{path}: choices are compared by the probability of `answer` as text; set it, and chat = false"
        )
    return Task(file, prompt, read_rows(path.parent / file.data))


def check_task(task: Task, limit: int | None = None) -> None:
    """See to it that the task's first `limit` rows can be asked about, and have right answers, before the first is asked.

    Raises:
        ValueError: as `check`, or as `answers_of`.
    """
    rows = task.rows[:limit]
    if task.file.kind == "generate":
        check(task.prompt, rows)
        return
    check_templates(task.prompt, rows)
    for row in rows:
        answers_of(task, row)


def run_task(task: Task, model: Model, limit: int | None = None, progress: Progress = quiet) -> list[Measure]:
    """The task's scores on its first `limit` rows, with standard errors over them."""
    task = replace(task, rows=task.rows[:limit])
    if task.file.kind == "generate":
        scored = score(task.prompt, task.rows, model, progress)
        return [_measure(task, task.prompt.output.match, scored.right)]
    plain, by_length = choose(task, model, progress)
    return [_measure(task, "accuracy", plain), _measure(task, "accuracy by length", by_length)]


def _measure(task: Task, metric: str, right: Sequence[bool]) -> Measure:
    value, error = mean_error(right)
    return Measure(task.file.name, metric, value, error, len(right))


def choose(task: Task, model: Model, progress: Progress = quiet) -> tuple[list[bool], list[bool]]:
    """Of each row: whether the right choice is the most probable one, and whether it is per byte of its text (long
    choices are less probable for their length alone); lm-eval's acc and acc_norm."""
    examples = Examples(task.prompt, model.embed)
    asked: list[tuple[str, str]] = []
    counts, labels = [], []
    for row in task.rows:
        answers, label = answers_of(task, row)
        context = as_text(task.prompt, examples.choose(render(task.prompt, "question", row)), row)
        asked += [(context, answer) for answer in answers]
        counts.append(len(answers))
        labels.append(label)
    found: dict[int, Likelihood] = {}
    for index, likelihood in model.likelihoods(asked):
        found[index] = likelihood
        progress(task.file.name, len(found), len(asked))
    plain, by_length, at = [], [], 0
    for count, label in zip(counts, labels, strict=True):
        logprobs = [found[index].logprob for index in range(at, at + count)]
        sizes = [len(asked[index][1].encode()) for index in range(at, at + count)]
        plain.append(best(logprobs) == label)
        by_length.append(best([one / size for one, size in zip(logprobs, sizes, strict=True)]) == label)
        at += count
    return plain, by_length


def answers_of(task: Task, row: Row) -> tuple[list[str], int]:
    """The texts that a row's choices are as answers, and the number of the right one.

    Raises:
        ValueError: as `choices_of`; or one is empty.
    """
    choices, label = choices_of(task.file, row)
    answers = [render(task.prompt, "answer", row | {task.file.label: choice}) for choice in choices]
    if not all(answers):
        raise ValueError(f"task {task.file.name}: the choice {choices[answers.index('')]!r} is an empty text")
    return answers, label


def best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def choices_of(file: TaskFile, row: Row) -> tuple[Sequence[str], int]:
    """A row's choices, and the number of the right one.

    Raises:
        ValueError: the row has no such field, or its label is none of the choices.
    """
    listed: Any = row.get(file.choices) if isinstance(file.choices, str) else file.choices
    if not isinstance(listed, list | tuple) or len(listed) < 2:
        where = f"a row's field {file.choices!r}" if isinstance(file.choices, str) else "choices"
        raise ValueError(f"task {file.name}: {where} must list at least two choices; it is {listed!r}")
    choices = [str(one) for one in listed]
    label = row.get(file.label)
    if str(label) in choices:
        return choices, choices.index(str(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return choices, label
    raise ValueError(f"task {file.name}: {file.label} = {label!r} is none of the choices {', '.join(choices)}")
