"""A prompt as a file: what is said to the model, with which examples and settings, and how its answer is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from weft.config.load import explain, read_text, read_toml
from weft.config.toml import toml_text

Row = dict[str, Any]
"""A labelled example, or a case to ask about: fields that templates name."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shots(Section):
    """Which examples stand before a question."""

    file: str = Field("", description="more examples, JSON lines; a path beside the prompt's own")
    count: int | None = Field(None, ge=0, description="examples that are shown; left out: all of the prompt's own")
    select: Literal["first", "random", "similar", "diverse"] = "first"
    by: Literal["words", "embeddings"] = Field("words", description="what similar and diverse go by")
    seed: int = Field(0, ge=0, description="of random")


class PromptSampling(Section):
    """As in the OpenAI API."""

    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(128, ge=1)
    stop: tuple[str, ...] = ()
    seed: int | None = None


class OutputCheck(Section):
    """What form an answer must have, and what of it counts."""

    choices: tuple[str, ...] = Field((), description="the text must be one of these")
    regex: str = Field("", description="the text must match it as a whole")
    json_schema: dict[str, Any] | None = Field(None, description="the text must be JSON of this schema")
    pattern: str = Field("", description="the answer is this regular expression's last match, its first group if any")
    field: str = Field("", description="the answer is this field of the JSON object")
    match: Literal["exact", "loose", "number", "contains"] = Field("exact", description="when an answer is right")
    votes: int = Field(1, ge=1, description="answers that are sampled for each question; the most frequent counts")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.choices) + bool(self.regex) + (self.json_schema is not None) > 1:
            raise ValueError("output: choices, regex and json_schema are three ways to say a form; keep one")
        if self.pattern and self.field:
            raise ValueError("output: pattern and field both say where the answer is; keep one")
        return self


class Prompt(Section):
    """Templates are jinja2's; they see the fields of a row. As text, a prompt is the instruction, each example's question
    and answer, and the question, with separators between; as chat, a system message and turns."""

    name: str
    version: int = Field(1, ge=1)
    parent: str = Field("", description="what it was made from")
    about: str = ""
    chat: bool = Field(False, description="as messages, for a model that was trained on conversations")
    instruction: str = ""
    question: str
    answer: str = Field("", description="how an example is answered; with the space that stands before")
    label: str = Field("", description="the right answer; left out: what would be read out of `answer`")
    separator: str = "\n\n"
    examples: tuple[Row, ...] = ()
    shots: Shots = Shots()
    sampling: PromptSampling = PromptSampling()
    output: OutputCheck = OutputCheck()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.output.votes > 1 and self.sampling.temperature == 0:
            raise ValueError(
                "output.votes: every answer is the same at temperature 0; set sampling.temperature, 0.7 for one"
            )
        if (self.examples or self.shots.file) and not self.answer:
            raise ValueError("there are examples, but no `answer` says how they are answered")
        return self

    @property
    def id(self) -> str:
        """Name, version, and the first digits of what `digest` says."""
        return f"{self.name}@{self.version}:{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """sha256 of all that the model sees and how it is read; not of name, version, parent and about."""
        seen = self.model_dump(mode="json", exclude={"name", "version", "parent", "about"})
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def read_prompt(path: Path) -> Prompt:
    """
    Raises:
        ValueError: there is no such file, or it is no prompt; names the setting. Examples are read in as well.
    """
    return make_prompt(read_toml(path), path)


def make_prompt(tree: dict[str, Any], path: Path) -> Prompt:
    """The prompt of a file's tables; the examples of `shots.file` become its own."""
    try:
        prompt = Prompt.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, Prompt)}") from None
    if not prompt.shots.file:
        return prompt
    more = read_rows(path.parent / prompt.shots.file)
    shots = prompt.shots.model_copy(update={"file": ""})
    return prompt.model_copy(update={"examples": (*prompt.examples, *more), "shots": shots})


def write_prompt(prompt: Prompt, path: Path) -> None:
    """Write a prompt so that `read_prompt` reads the same; settings at their defaults are left out.

    Raises:
        ValueError: the file is there already: a version once written does not change.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: a version, once written, stays; choose another name")
    tree = prompt.model_dump(mode="json", exclude_defaults=True)
    examples = tree.pop("examples", [])
    rows = "".join(f"    {_inline(row)},\n" for row in examples)
    text = toml_text({key: value for key, value in tree.items() if not isinstance(value, dict)})
    text += f"examples = [\n{rows}]\n" if examples else ""
    text += toml_text({key: value for key, value in tree.items() if isinstance(value, dict)}).rstrip("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Rows of JSON lines.

    Raises:
        ValueError: there is no such file, it is not text, no row is in it, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not at every separator that Unicode has
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: a row is an object of fields, as in {{"question": …}}')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _inline(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return toml_text({"value": value}).removeprefix("value = ").rstrip("\n")
