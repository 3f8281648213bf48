"""Dataclasses of columns, as a Work is: made of many, cut by rows, chosen between row by row. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np

from weft.plan.work import Num

T = TypeVar("T")


def stack(items: Sequence[T]) -> T:
    """Many of a kind side by side: every field a column."""
    first: Any = items[0]
    if not is_dataclass(first):
        return cast(T, np.array(items, dtype=float))
    return _of(first, {name: stack([getattr(item, name) for item in items]) for name in _names(first)})


def rows(columns: T, index: Num) -> T:
    """These rows alone; what is one number for all rows stays."""
    values = {name: getattr(columns, name) for name in _names(columns)}
    return _of(columns, {name: value[index] if np.ndim(value) else value for name, value in values.items()})


def chosen(where: Num, one: T, other: T) -> T:
    """In each row, of two of a kind the one where it is so, and else the other."""
    return _of(one, {name: np.where(where, getattr(one, name), getattr(other, name)) for name in _names(one)})


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _of(kind: Any, columns: dict[str, Any]) -> Any:
    return replace(kind, **columns)
