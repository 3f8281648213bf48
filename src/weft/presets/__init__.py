"""Published models by name: one TOML file each in this folder."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from pathlib import Path

from weft.models.shape import Shape

FOLDER = Path(__file__).parent / "models"


@functools.cache
def preset_names() -> tuple[str, ...]:
    """Every preset: series by series, each from small to large."""
    names = (path.stem for path in FOLDER.glob("*.toml"))
    return tuple(sorted(names, key=lambda name: (preset_series(name), _read(name).num_params)))


def preset_series(name: str) -> str:
    """`llama3` of `llama3-70b`, `qwen3` of `qwen3-30b-a3b`, `deepseek` of `deepseek-v3`."""
    return re.sub(r"-([\dx.]+[bm](-a\d+b)?|v\d.*)$", "", name)


def preset_shape(name: str) -> Shape:
    """The shape of a published model.

    Raises:
        ValueError: no such preset; names the nearest.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "`weft models` lists them"
        raise ValueError(f"there is no preset {name!r}: {hint}")
    return _read(name)


def preset_text(name: str) -> str:
    """The preset's file, with its source."""
    preset_shape(name)
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


@functools.cache
def _read(name: str) -> Shape:
    return Shape.model_validate(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")))
