"""Where the model runs, and in which numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weft.models.dtypes import dtype_of


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: no device has that name, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch's words for: not built in, no driver, no such index
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ValueError: the name is another.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return dtype_of(name)


@contextmanager
def room_on(device: torch.device, ways_out: str = "weights of fewer bits (--dtype)") -> Iterator[None]:
    """Where a model, and its cache, are given memory.

    Raises:
        ValueError: the device has less.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in first:  # a CPU's words
            raise
        raise ValueError(
            f"the model and its cache have no room on {device}; what helps: {ways_out}; PyTorch says: {first}"
        ) from None
