"""Settings as a TOML file: complete, so that it can be saved and trained with as it lies. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weft.config.tree import Config


def config_toml(config: Config) -> str:
    """Every setting that is not left open, the layout in its short form; `load_config` reads the same Config from it."""
    tree = config.model_dump(mode="json", exclude_none=True)
    tree["train"]["seq"] = config.seq
    tree["layout"] = str(config.layout)
    return toml_text(tree)


def toml_text(tree: Mapping[str, Any]) -> str:
    return "\n".join(_lines("", tree)) + "\n"


def _lines(path: str, table: Mapping[str, Any]) -> list[str]:
    """Plain values first, as TOML wants them, then the tables."""
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            name = f"{path}{key}"
            lines += ["", f"[{name}]", *_lines(f"{name}.", value)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # else, TOML's strings are JSON's
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
