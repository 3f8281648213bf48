"""Templates to text: jinja2 in its sandbox, with every name that a row lacks an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft.prompt.file import Prompt, Row

Message = dict[str, str]
"""A turn of a conversation: role and content."""


@lru_cache
def environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


@lru_cache(maxsize=256)
def compiled(template: str) -> Template:
    return environment().from_string(template)


def render(prompt: Prompt, part: str, row: Mapping[str, Any]) -> str:
    """One of a prompt's templates, filled in with a row. What rows hold is never taken for a template.

    Raises:
        ValueError: the template is malformed, names a field that the row lacks, or does what the sandbox forbids.
    """
    try:
        return compiled(getattr(prompt, part)).render(row)
    except TemplateSyntaxError as error:
        raise ValueError(f"prompt {prompt.name}, {part}, line {error.lineno}: {error.message}") from None
    except UndefinedError as error:
        fields = ", ".join(row) or "none"
        raise ValueError(f"prompt {prompt.name}, {part}: {error.message}; the row's fields: {fields}") from None
    except SecurityError as error:
        raise ValueError(f"prompt {prompt.name}, {part}: a template may not do this: {error}") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, OverflowError) as error:
        raise ValueError(f"prompt {prompt.name}, {part}: {error}") from None


def as_text(prompt: Prompt, examples: Sequence[Row], row: Row) -> str:
    """What a model continues."""
    shown = [render(prompt, "question", it) + render(prompt, "answer", it) for it in examples]
    instruction = [render(prompt, "instruction", row)] if prompt.instruction else []
    return prompt.separator.join([*instruction, *shown, render(prompt, "question", row)])


def check_templates(prompt: Prompt, rows: Sequence[Row]) -> None:
    """See to it that every row can be asked about, before the first is.

    Raises:
        ValueError: as `render`.
    """
    ways = as_messages if prompt.chat else as_text
    ways(prompt, prompt.examples if prompt.shots.count != 0 else (), rows[0])
    for row in rows:
        ways(prompt, (), row)


def as_messages(prompt: Prompt, examples: Sequence[Row], row: Row) -> tuple[Message, ...]:
    """What a model answers: an example is a question of the user's and an answer of the assistant's."""
    turns: list[Message] = []
    if prompt.instruction:
        turns.append({"role": "system", "content": render(prompt, "instruction", row)})
    for example in examples:
        turns.append({"role": "user", "content": render(prompt, "question", example)})
        turns.append({"role": "assistant", "content": render(prompt, "answer", example).strip()})
    return (*turns, {"role": "user", "content": render(prompt, "question", row)})
