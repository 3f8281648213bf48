"""Kernels: which of torch's a process takes."""

from __future__ import annotations

import os
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


def be_deterministic(device: torch.device) -> None:
    """Have a GPU give the same bits at every start, in this process, from here on: sums in a fixed order, never by
    atomics, and no choice by the clock. To be called before its first product, when cuBLAS takes its workspace.

    torch raises where an operation has no such kernel. Of attention flash and efficient have one; cuDNN's backward has
    none, and `auto` passes it by. On a CPU nothing changes.
    """
    if device.type != "cuda":
        return
    import torch._inductor.config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.deterministic = True
    inductor.deterministic = True
