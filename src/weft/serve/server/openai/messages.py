"""The messages of a chat, as templates take them. Torch-free."""

from __future__ import annotations

import json
from typing import Any

from weft.serve.server.errors import FieldError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(value: Any) -> list[Message]:
    """Messages as OpenAI writes them → as templates expect them: contents are texts, arguments of calls are tables.

    Raises:
        FieldError: names the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise FieldError("messages must be a list of at least one message", "messages")
    return [read_message(one, f"messages.{number}") for number, one in enumerate(value)]


def read_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise FieldError(f"{where} must be a table with role and content", where)
    role = value.get("role")
    if role not in ROLES:
        raise FieldError(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
    message: Message = {"role": "system" if role == "developer" else role}
    if value.get("function_call") is not None:
        raise FieldError(
            f"{where}.function_call is OpenAI's older way to call: write tool_calls", f"{where}.function_call"
        )
    content = value.get("content")
    if content is None and role == "assistant":  # said nothing, or would not say it
        content = value.get("refusal") or ""
    message["content"] = read_content(content, f"{where}.content")
    if calls := value.get("tool_calls"):
        if not isinstance(calls, list):
            raise FieldError(f"{where}.tool_calls must be a list", f"{where}.tool_calls")
        message["tool_calls"] = [read_call(one, f"{where}.tool_calls.{number}") for number, one in enumerate(calls)]
    elif content is None:
        raise FieldError(f"{where}.content is missing", f"{where}.content")
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise FieldError(f"{where}.{name} must be a text", f"{where}.{name}")
            message["reasoning_content" if name == "reasoning" else name] = value[name]  # vLLM's word for it
    return message


def read_content(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise FieldError(f"{where} must be a text or a list of parts", where)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise FieldError(f"{where}.{number} is no text; this model reads nothing else", f"{where}.{number}")
        texts.append(part[kind])
    return "".join(texts)


def read_call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{where}.function must have a name", f"{where}.function")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise FieldError(f"{where}.function.arguments is not JSON", f"{where}.function.arguments") from None
    return {
        "id": str(value.get("id", "")), "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }  # fmt: skip
