"""The peak FLOP/s of a device, which MFU is measured against: from the datasheet, or measured here."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
SLOW = 5e9
"""FLOP/s of a matmul whose larger kin is not worth waiting for: it would take half a second."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one device can do at most in one precision, and how that is known."""

    flops: float
    source: Literal["datasheet", "measured"]
    device: str  # as its maker calls it; for a CPU, its threads

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s {self.source}"


# Dense TFLOP/s with accumulation in fp32, without sparsity: (bf16 and fp16, tf32, fp32), from NVIDIA's datasheets and
# architecture papers. The first name found in the device's name counts, so the special form stands before the general.
DATASHEET: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2500, 1250, 80)),
    ("B200", (2250, 1125, 75)),
    ("H200 NVL", (835, 418, 60)),
    ("H200", (989, 495, 67)),
    ("GH200", (989, 495, 67)),
    ("H100 NVL", (835, 418, 60)),
    ("H100 PCIe", (756, 378, 51)),
    ("H100", (989, 495, 67)),
    ("H800", (989, 495, 67)),
    ("H20", (148, 74, 44)),
    ("A100", (312, 156, 19.5)),
    ("A800", (312, 156, 19.5)),
    ("L40S", (362, 183, 91.6)),
    ("L40", (181, 90.5, 90.5)),
    ("L4", (121, 60, 30.3)),
    ("A40", (149.7, 74.8, 37.4)),
    ("A10G", (70, 35, 35)),
    ("A10", (125, 62.5, 31.2)),
    ("RTX 5090", (209.5, 104.8, 104.8)),
    ("RTX 4090 D", (147, 73.5, 73.5)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71, 35.6, 35.6)),
    ("RTX 6000 Ada", (364, 182, 91.1)),
    ("RTX A6000", (154.8, 77.4, 38.7)),
    ("V100", (125, 15.7, 15.7)),
    ("T4", (65, 8.1, 8.1)),
)


def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """The dense matmul peak of one device: the datasheet's for a known GPU, else what a matmul reaches here.

    fp32 on a GPU counts as TF32 where torch may use it for matmuls.
    """
    if device.type != "cuda":
        threads = torch.get_num_threads()
        name = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
        return Peak(_measured("cpu", precision, threads), "measured", name)
    name = torch.cuda.get_device_name(device)
    if known := datasheet_flops(name, precision, tf32=torch.get_float32_matmul_precision() != "highest"):
        return Peak(known, "datasheet", name)
    return Peak(_measured(str(device), precision, 0), "measured", name)


def datasheet_flops(name: str, precision: Precision, *, tf32: bool = False) -> float | None:
    """Dense FLOP/s of the GPU that CUDA calls `name`; None where it is not in the table."""
    if "laptop" in name.lower():
        return None  # the same name as the card, and less of everything
    for part, (half, tensor32, single) in DATASHEET:
        if re.search(rf"\b{part}\b", name, re.IGNORECASE):
            return 1e12 * (half if precision != "fp32" else tensor32 if tf32 else single)
    return None


@cache
def _measured(device: str, precision: Precision, threads: int) -> float:
    """FLOP/s of the best of several square matmuls; `threads` is here so that each number of threads has its own."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device != "cpu":
        return _matmul(device, dtype, 8192)
    small = _matmul(device, dtype, 256)
    # a CPU without instructions for 16 bits takes seconds for a large one, and is no faster
    return small if small < SLOW else max(small, _matmul(device, dtype, 1024))


def _matmul(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of several matmuls of this size, in a third of a second."""
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    best, began = float("inf"), time.perf_counter()
    for turn in range(50):
        start = time.perf_counter()
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - began > 0.3:
            break
    return 2 * size**3 / best
