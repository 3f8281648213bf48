"""Tools: how a chat names them, and how an answer calls them. Torch-free."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.serve.server.errors import FieldError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

MOST_CALLS = 8
"""Of one answer that has to call."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"

NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples")
"""Keywords of a JSON schema: those with schemas by names that a client chose, and those with what is no schema."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        whole: as the client wrote it, for the template.
        strict: its calls have to fit their schema in every keyword; else, as OpenAI has it, as well as can be.
    """

    name: str
    parameters: dict[str, Any]
    whole: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Choice:
    """Whether to call.

    Attributes:
        mode: auto: as the model likes; none; required: at least one; named: this one.
    """

    mode: str
    name: str = ""


@dataclass(frozen=True)
class Call:
    """A function that an answer calls; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def table(self, index: int | None = None) -> dict[str, Any]:
        """As OpenAI writes it; with its number, in a stream."""
        number = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**number, "id": self.id, "type": "function", "function": function}


def read_tools(value: Any) -> list[Tool]:
    """
    Raises:
        FieldError: names the tool.
    """
    if not isinstance(value, list):
        raise FieldError("tools must be a list", "tools")
    return [read_tool(one, f"tools.{number}") for number, one in enumerate(value)]


def read_tool(value: Any, where: str) -> Tool:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type") != "function":
        raise FieldError(f'{where} must be {{"type": "function", "function": {{…}}}}', where)
    name, parameters = function.get("name"), function.get("parameters") or {"type": "object"}
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise FieldError(f"{where}.function.name must match {NAME.pattern}", f"{where}.function.name")
    if not isinstance(parameters, dict):
        raise FieldError(f"{where}.function.parameters must be a JSON schema", f"{where}.function.parameters")
    return Tool(name, parameters, value, function.get("strict") is True)


def read_choice(value: Any) -> Choice:
    """
    Raises:
        FieldError: it is none of OpenAI's.
    """
    if value in ("auto", "none", "required"):
        return Choice(value)
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return Choice("named", function["name"])
    raise FieldError(
        'tool_choice must be auto, none, required, or {"type": "function", "function": {"name": …}}', "tool_choice"
    )


def forced_form(tools: Sequence[Tool], choice: Choice, parallel: bool) -> dict[str, Any]:
    """The JSON schema of an answer that has to call.

    Raises:
        FieldError: no tool has the name.
    """
    wanted = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    if not wanted:
        raise FieldError(f"tool_choice: no tool is named {choice.name!r}", "tool_choice")
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": moved(tool.parameters, f"#/items/anyOf/{number}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(wanted)
    ]
    most = MOST_CALLS if parallel and choice.mode == "required" else 1
    lenient = not any(tool.strict for tool in wanted)  # llguidance's: pass over keywords that it cannot hold to
    more = {"minItems": 1, "maxItems": most, "x-guidance": {"lenient": lenient}}
    return {"type": "array", "items": {"anyOf": forms}, **more}


def moved(schema: Any, place: str) -> Any:
    """A JSON schema that stands at `place` of another: what it finds from its own root (`#/$defs/City`) is found there."""
    if isinstance(schema, list):
        return [moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            found[keyword] = place + value[1:]
        elif keyword in NAMED and isinstance(value, dict):
            found[keyword] = {name: moved(one, place) for name, one in value.items()}
        else:
            found[keyword] = value if keyword in DATA else moved(value, place)
    return found


class Reader(Protocol):
    """Parts an answer into what it says and what it calls, as it comes."""

    def push(self, text: str) -> tuple[str, list[Call]]: ...

    def close(self) -> tuple[str, list[Call]]: ...


def make_reader(template: str, tools: Sequence[Tool], choice: Choice) -> Reader:
    """The reader of a model's way of calling, which its template shows."""
    if not tools or choice.mode == "none":
        return Plain()
    if choice.mode == "auto" and OPEN in template:
        return Marked({tool.name for tool in tools})
    return Bare({tool.name for tool in tools})


class Plain:
    """Calls nothing."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        return text, []

    def close(self) -> tuple[str, list[Call]]:
        return "", []


class Marked:
    """Calls stand between <tool_call> and </tool_call> (Hermes, Qwen)."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self._text, self._inside = "", False  # what is not told yet, and whether it is a call

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._text += text
        content, calls = "", list[Call]()
        while True:
            before, mark, after = self._text.partition(CLOSE if self._inside else OPEN)
            if not mark:
                break
            if self._inside:
                found = read_calls(before, self.names)
                calls += found
                content += "" if found else f"{OPEN}{before}{CLOSE}"
            else:
                content += before
            self._text, self._inside = after, not self._inside
        if not self._inside:
            sure = len(self._text) - begun(self._text, OPEN)
            content, self._text = content + self._text[:sure], self._text[sure:]
        return content, calls

    def close(self) -> tuple[str, list[Call]]:
        if not self._inside:
            return self._text, []
        found = read_calls(self._text, self.names)
        return ("", found) if found else (OPEN + self._text, [])


def begun(text: str, mark: str) -> int:
    """Characters at the text's end that may be the start of the mark."""
    return next((size for size in range(min(len(mark), len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


class Bare:
    """The whole answer is one call or a list of them, in JSON (Llama 3, and every answer that has to call)."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self._held = ""
        self._says = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        if self._says:
            return text, []
        self._held += text
        start = self._held.lstrip()
        if start and start[0] not in "{[":
            self._says, said, self._held = True, self._held, ""
            return said, []
        return "", []

    def close(self) -> tuple[str, list[Call]]:
        found = read_calls(self._held, self.names)
        return ("", found) if found else (self._held, [])


def read_calls(text: str, names: set[str]) -> list[Call]:
    """The calls in a JSON text: none, where it is no JSON, or calls what there is not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or one.get("name") not in names:
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        calls.append(Call(one["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    return calls
