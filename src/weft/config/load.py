"""Settings from TOML files and the command line: composed left to right, then checked as a whole."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.presets import preset_shape


def load_config(files: Iterable[str | Path], overrides: Iterable[str | tuple[str, Any]] = ()) -> Config:
    """The configuration that TOML files, then overrides, add up to: `key.path=value` texts, or pairs of both.

    `[model] preset = "gpt2-124m"` starts from a preset; other keys beside it change it. `layout` may be a table or its
    text form.

    Raises:
        ValueError: unreadable file, unknown key (with the nearest known one), or a combination that cannot work.
    """
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, read_toml(Path(file)))
    for override in overrides:
        tree = merge(tree, parse_override(override) if isinstance(override, str) else nest(*override))
    return make_config(tree)


def make_config(tree: Mapping[str, Any]) -> Config:
    """A Config out of nested dicts; errors in weft's own words."""
    tree = dict(tree)
    if isinstance(model := tree.get("model"), str):
        tree["model"] = {"preset": model}
    if isinstance(model := tree.get("model"), Mapping) and "preset" in model:
        model = dict(model)
        tree["model"] = merge(preset_shape(model.pop("preset")).model_dump(), model)
    if "model" not in tree:
        raise ValueError(
            "which model? Set model.preset (see `weft models`), as in --model gpt2-124m, or a [model] table"
        )
    if isinstance(layout := tree.get("layout"), str):
        tree["layout"] = Layout.parse(layout)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, Config)) from None


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: there is no such file, or it is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a text with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"there is no config file {path}")
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def parse_override(text: str) -> dict[str, Any]:
    """`optimizer.lr=3e-4` as nested dicts. The value is TOML; what is not TOML is taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text!r}: write it as key=value, for example optimizer.lr=3e-4")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return nest(key.strip(), parsed)


def nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 as {"a": {"b": 1}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, table by table; a new preset replaces the whole model, a text layout the whole layout."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        if isinstance(mine, str) and isinstance(value, Mapping) and key == "layout":
            mine = Layout.parse(mine).model_dump()
        starts_over = isinstance(value, Mapping) and "preset" in value
        both = isinstance(mine, Mapping) and isinstance(value, Mapping)
        out[key] = merge(mine, value) if both and not starts_over else value  # type: ignore[arg-type]
    return out


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """pydantic's findings in one sentence each, with the nearest known key for an unknown one."""
    return "\n".join(_explain_one(found, root) for found in error.errors())


def _explain_one(found: Any, root: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        known = list(_fields_at(root, found["loc"][:-1]))
        near = difflib.get_close_matches(str(found["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown setting {path!r}: {hint}"
    if found["type"] == "missing":
        return f"setting {path!r} is missing"
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    if found["type"] in ("model_type", "model_attributes_type"):
        return f"{path} = {found['input']!r}: {path} is a table of settings"
    return f"{path} = {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}"


def _fields_at(root: type[BaseModel], location: tuple[Any, ...]) -> Iterable[str]:
    model = root
    for name in location:
        if str(name) not in model.model_fields:  # a name in a table of such
            continue
        annotation = model.model_fields[str(name)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model.model_fields
