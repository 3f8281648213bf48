"""The text form of protobuf, in which Triton wants a model's config. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """A value that stands without quotes: a name of an enum."""


def pbtxt(fields: Mapping[str, Any], indent: str = "") -> str:
    """A message: a table is a message of its own, a list a field that is repeated."""
    return "".join(f"{indent}{name}{_value(value, indent)}\n" for name, value in fields.items())


def _value(value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f" {{\n{pbtxt(value, indent + '  ')}{indent}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(one, Mapping) for one in value):
            inner = indent + "  "
            return ": [\n" + ",\n".join(inner + _value(one, inner).lstrip() for one in value) + f"\n{indent}]"
        return ": [ " + ", ".join(_scalar(one) for one in value) + " ]"
    return f": {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value, ensure_ascii=True)  # true, 1 and "text" are written alike in both
