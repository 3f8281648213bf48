"""Triton, the language that kernels for a GPU are written in here."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether it is here; torch brings it along where there is CUDA."""
    return importlib.util.find_spec("triton") is not None
