"""Products of a few rows, on a CPU.

A decoding step multiplies every matrix with as many rows as there are sequences: few, for which the libraries behind
`torch.nn.functional.linear` are not at their best. Other ways to the same numbers (`benchmarks/served_products.py`):

- kernels of our own (`native.py`), where there is a C++ compiler. They take a matrix as it lies, at the speed of memory. Of
  torch's time, in bf16: on AVX2 a half for one row; on AVX-512 a half to 0.7 for one to eight; with tiles (AMX) 0.6 to
  0.8 up to 32. In fp32: on AVX2 1 for one row, 0.6 for two; on AVX-512 1 for one, a half for four to eight, 0.8 for 16.
- the matrix first, W xᵀ. In fp32 on AVX2, 4 rows in half the time, 8 in 0.6, 64 in 0.9; our kernel takes 0.6 to 0.8 of
  that for 8, and 0.8 to 0.95 for 64. In bf16 with tiles, 65 to 192 rows in 0.65 to 0.9.
- bf16 on a CPU that cannot multiply it: torch's own product there takes as long for each row as for the first. The
  matrix is made fp32, a piece that fits into the cache at a time: 8 rows in half the time, 64 in a fifth.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.head import Head
from weft.parallel.tensor import RowLinear
from weft.serve.kernels.native import library, rows_product

WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Vectors of 512 bits."""

WIDEN_FROM = 4
"""Rows from which on widening a bf16 matrix pays."""

PIECE = 1 << 19
"""Numbers of a matrix that are made fp32 at once."""


class ServedLinear(nn.Linear):
    """The plain reference is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ServedHead(Head):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None)


class ServedRowLinear(RowLinear):
    def product(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None)


SERVED = {nn.Linear: ServedLinear, Head: ServedHead, RowLinear: ServedRowLinear}


def quicken(model: nn.Module) -> None:
    """Let a model's products choose their way while it serves; anywhere else it is what it was."""
    library()  # which may take five seconds: now, not when somebody waits
    for module in model.modules():
        if type(module) in SERVED:
            module.__class__ = SERVED[type(module)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I] → [..., O], as torch.nn.functional.linear but for rounding."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        y: Tensor = torch.ops.weft.served_linear(x, weight, bias)
        return y
    return chosen(x, weight, bias)


def chosen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The way that is the fastest for so many rows."""
    rows, low = x.numel() // x.shape[-1], weight.dtype == torch.bfloat16 and not multiplies_bf16()
    if x.is_cuda or x.dtype != weight.dtype or not torch.is_inference_mode_enabled():
        return F.linear(x, weight, bias)
    if rows <= most_ours(weight.dtype) and weight.is_contiguous() and library():
        return rows_product(x, weight, bias)
    if rows in matrix_first(weight.dtype):
        y = torch.mm(weight, x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)
    elif low and rows >= WIDEN_FROM:
        y = widened(x.flatten(0, -2).float(), weight).view(*x.shape[:-1], -1)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y.add_(bias)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] in fp32, weight [O, I] in bf16 → [N, O] in bf16."""
    y = x.new_empty(len(x), len(weight), dtype=weight.dtype)
    at = 0
    for piece in weight.split(max(1, PIECE // weight.shape[1])):
        y[:, at : at + len(piece)] = chosen(x, piece.float(), None)
        at += len(piece)
    return y


def most_ours(dtype: torch.dtype) -> int:
    """Most rows for which our own kernels are the fastest on this CPU; 0: they never are."""
    if dtype == torch.float32:
        return 16 if WIDE else 128
    if dtype == torch.bfloat16:  # instructions for it are what libraries have for more rows
        return 16 if multiplies_bf16() and not has_tiles() else 64
    return 0


def matrix_first(dtype: torch.dtype) -> range:
    """Rows for which, where no kernel of ours is, W xᵀ is faster than x Wᵀ."""
    if dtype == torch.float32:
        return range(3, 49 if WIDE else 129)
    return range(65, 193) if dtype == torch.bfloat16 and has_tiles() else range(0)


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it."""
    return torch.cpu._is_avx512_bf16_supported() or has_tiles()


@cache
def has_tiles() -> bool:
    """Whether they are for tiles of numbers (AMX)."""
    return torch.cpu._is_amx_tile_supported()


# -- the same as one operation, for compiled blocks: the compiler does not know how many rows there will be ----------

_LIBRARY = torch.library.Library("weft", "FRAGMENT")
_LIBRARY.define("served_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("served_linear", chosen, "CompositeExplicitAutograd")
torch.library.register_fake(
    "weft::served_linear", lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_LIBRARY
)
