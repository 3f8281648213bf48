"""The part of a Hugging Face config.json that speaks of rotary positions, both ways. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.models.keys import Keys, number
from weft.models.shape import RopeScaling, Shape, Yarn

FIELDS = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"),
}
"""What each kind of stretch needs. Of yarn some have a default there, which depends on the others: not here."""


def rope_from_config(keys: Keys, default: float) -> tuple[float, dict[str, Any]]:
    """theta, and rope_scaling or yarn, from either spelling; where both are there, they must agree."""
    top = keys.get("rope_theta")
    spellings = {name: keys.get(name) for name in ("rope_scaling", "rope_parameters")}
    found = [_rope_table(name, table, top, default) for name, table in spellings.items() if table]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("config.json: rope_scaling (with rope_theta) and rope_parameters disagree")
    return found[0] if found else (number("rope_theta", default if top is None else top), {})


def _rope_table(name: str, table: Any, top: float | None, default: float) -> tuple[float, dict[str, Any]]:
    if not isinstance(table, Mapping):
        raise ValueError(f"config.json: {name} is {table!r}; it must be a table of settings, or null")
    rope = dict(table)
    theta = next(value for value in (rope.pop("rope_theta", None), top, default) if value is not None)
    if top is not None and top != theta:
        raise ValueError(f"config.json: rope_theta is {top}, and {theta} in {name}")
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    if rope.pop("type", kind) != kind:
        raise ValueError(f"config.json: {name} names two types")
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError(f"config.json: {name}.partial_rotary_factor: weft turns whole heads")
    if kind not in ("default", *FIELDS):
        known = "', '".join(("default", *FIELDS))
        raise ValueError(f"config.json: {name}.rope_type is {kind!r}; weft computes '{known}'")
    needed = set(FIELDS.get(kind, ()))
    if unknown := sorted(rope.keys() - needed):
        raise ValueError(f"config.json: {name}.{unknown[0]} means nothing to weft where rope_type is {kind!r}")
    if missing := sorted(needed - rope.keys()):
        raise ValueError(f"config.json: {name}.{missing[0]} is missing; rope_type {kind!r} needs it")
    theta = number("rope_theta", theta)
    if kind == "default":
        return theta, {}
    numbers: dict[str, Any] = {key: number(f"{name}.{key}", value) for key, value in rope.items()}
    numbers["original_max_seq"] = int(numbers.pop("original_max_position_embeddings"))
    return theta, {"rope_scaling": RopeScaling(**numbers)} if kind == "llama3" else {"yarn": Yarn(**numbers)}


def config_from_rope(shape: Shape) -> dict[str, Any] | None:
    """The stretch of the frequencies as `rope_scaling`."""
    scaling = shape.rope_scaling or shape.yarn
    if scaling is None:
        return None
    numbers = scaling.model_dump()
    original = numbers.pop("original_max_seq")
    kind = "llama3" if shape.rope_scaling else "yarn"
    return {"rope_type": kind, **numbers, "original_max_position_embeddings": original}
