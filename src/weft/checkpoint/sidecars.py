"""The small text files beside the weights: configs and the tokenizer. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's text files; their names. Raises ValueError where it needs code of its own to run."""
    if (settings := Path(source) / "tokenizer_config.json").is_file() and read_json(settings).get("auto_map"):
        raise ValueError(f"{settings}: auto_map asks to run code that comes with the tokenizer; weft never does")
    names = [name for name in _TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in names:
        (Path(target) / name).write_bytes((Path(source) / name).read_bytes())
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A table. Raises ValueError where the file is missing or something else."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a table of settings")
    return table


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """On the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(table, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
