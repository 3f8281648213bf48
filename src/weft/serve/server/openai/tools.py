"""Tools: how a chat names them, how an answer has to call them, and what a call is. Torch-free."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.serve.server.errors import FieldError
from weft.serve.server.ways import NAME, Texts

MOST_CALLS = 8
"""Of one answer that has to call."""

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


def make_call(name: str, arguments: Any, tools: Sequence[Tool]) -> Call:
    """A call as a model wrote it. A text means what the function's schema has there: a text, or JSON."""
    if isinstance(arguments, Texts):
        forms = next((tool.parameters.get("properties") for tool in tools if tool.name == name), None)
        forms = forms if isinstance(forms, dict) else {}
        arguments = {key: meant(text, forms.get(key)) for key, text in arguments.items()}
    return Call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def meant(text: str, form: Any) -> Any:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
        FieldError: there is no tool, or none has the name.
    """
    if not tools:
        raise FieldError("tool_choice: there is nothing to call: give tools", "tool_choice")
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
