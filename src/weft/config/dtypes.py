"""What numbers are called, by weft and by torch. Torch-free."""

from __future__ import annotations

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_name(name: str) -> str:
    """Of weft's name, or of torch's own (`bfloat16`).

    Raises:
        ValueError: it is neither.
    """
    if name not in (*TORCH_NAMES, *TORCH_NAMES.values()):
        raise ValueError(f"--dtype {name}: choose fp32, bf16 or fp16")
    return TORCH_NAMES.get(name, name)
