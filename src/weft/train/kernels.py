"""Kernels: which of torch's a process takes."""

from __future__ import annotations

from typing import Literal

import torch
from torch.backends import cuda

ATTENTION = {
    "flash": cuda.enable_flash_sdp, "cudnn": cuda.enable_cudnn_sdp, "efficient": cuda.enable_mem_efficient_sdp,
}  # fmt: skip


def choose_attention(name: Literal["auto", "flash", "cudnn", "efficient"], device: torch.device) -> None:
    """Have attention on a GPU take this kernel, in this process, from here on; `auto`: the one that torch thinks best.

    Where a named one cannot do what is asked of it, torch raises: nothing slower takes its place in silence. On a CPU there
    is one kernel. cp's own attention is not asked.
    """
    if device.type != "cuda":
        return
    for kernel, allow in ATTENTION.items():
        allow(name in ("auto", kernel))
    cuda.enable_math_sdp(name == "auto")
