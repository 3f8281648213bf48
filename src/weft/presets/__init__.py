"""Published models by name: one TOML file each in this folder."""

from __future__ import annotations

import difflib
import functools
import tomllib
from pathlib import Path

from weft.models.shape import Shape

FOLDER = Path(__file__).parent / "models"


@functools.cache
def preset_names() -> tuple[str, ...]:
    """Every preset."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def preset_shape(name: str) -> Shape:
    """The shape of a published model.

    Raises:
        ValueError: no such preset; names the nearest.
    """
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "`weft models` lists them"
        raise ValueError(f"there is no preset {name!r}: {hint}")
    return Shape.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
