"""`model.json` beside a model's `model.py`: which weights, and the engine's settings. Torch-free."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from weft.checkpoint.sidecars import read_json
from weft.serve.config import EngineConfig

FILE = "model.json"
WEIGHTS = "weights"
ADAPTERS = "adapters"


def settings_table(config: EngineConfig) -> dict[str, Any]:
    """All that can be set, with what it is set to."""
    return {"weights": WEIGHTS, **dataclasses.asdict(config)}


def read_settings(version: Path) -> tuple[Path, EngineConfig]:
    """Of a version's folder: where its weights are, and how to serve them. Paths are absolute, or go on from there.

    Raises:
        ValueError: the file is missing or not JSON; a setting that there is not, or a value that it may not have.
    """
    file = version / FILE
    table = read_json(file)
    weights = table.pop("weights", WEIGHTS)
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    if unknown := sorted(table.keys() - fields.keys()):
        raise ValueError(f"{file}: {', '.join(unknown)}: unknown; settings are weights, {', '.join(fields)}")
    for name, value in table.items():
        allowed = ["dict" if kind.startswith("Mapping") else kind for kind in str(fields[name].type).split(" | ")]
        if type(value).__name__.replace("NoneType", "None") not in [*allowed, *(["int"] if "float" in allowed else [])]:
            raise ValueError(f"{file}: {name} is {value!r}; it must be {' or '.join(allowed)}")
    adapters = table.get("adapters", {})
    if bad := [name for name, path in adapters.items() if not isinstance(path, str) or not (version / path).is_dir()]:
        raise ValueError(f"{file}: adapters: {bad[0]} is {adapters[bad[0]]!r}; it must be an adapter's folder")
    table["adapters"] = {name: str(version / path) for name, path in adapters.items()}
    try:
        config = EngineConfig(**table)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return version / weights, config
