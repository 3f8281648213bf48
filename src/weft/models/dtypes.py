"""Names of the numbers that weights and activations are."""

from __future__ import annotations

import torch

from weft.config.dtypes import TORCH_NAMES, torch_name

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, told) for name, told in TORCH_NAMES.items()}


def dtype_of(name: str) -> torch.dtype:
    """By weft's name, or by torch's own (`bfloat16`).

    Raises:
        ValueError: it has another name.
    """
    dtype: torch.dtype = getattr(torch, torch_name(name))
    return dtype
