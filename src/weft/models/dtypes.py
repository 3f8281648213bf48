"""Names of the numbers that weights and activations are."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """By weft's name, or by torch's own (`bfloat16`).

    Raises:
        ValueError: it has another name.
    """
    for short, dtype in DTYPES.items():
        if name in (short, str(dtype).removeprefix("torch.")):
            return dtype
    raise ValueError(f"--dtype {name}: choose fp32, bf16 or fp16")
