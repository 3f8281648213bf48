"""fp8: the matrices of the blocks multiply in 8 bits (Micikevicius et al., FP8 Formats for Deep Learning, 2022).

Each product of a matrix, forward and both of backward, takes its operands as 8-bit floats with scales, and gives bf16.
Activations and weights are e4m3, gradients e5m2, which has a wider range and fewer digits. A tensor has one scale; with
`fp8row` each row of the left operand and each column of the right has its own, and gradients are e4m3 too. What is kept
for backward is bf16. First and last block and the head compute in bf16.

Scales are powers of two. So another scale changes no digit of a number, but of those that are far smaller than the
largest and leave the range: a process that sees a part of a tensor (its micro-batch, its share of a matrix) scales that
part alone, sends nothing, and gets nearly what the whole would give. On a CPU the same 8-bit numbers are multiplied as
bf16, and everything here runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.parallel.products import Products
from weft.parallel.tensor import RowLinear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 2.0**-100
"""What the largest number of a tensor counts for at least, so that the scale of zeros is a number."""


def use_fp8(blocks: nn.ModuleDict, num_layers: int, by_row: bool) -> None:
    """Let the matrices of blocks multiply in fp8; not those of the model's first and last block."""
    for index, block in blocks.items():
        if int(index) in (0, num_layers - 1):
            continue
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = Fp8RowLinear if isinstance(module, RowLinear) else Fp8Linear
                module.products = Fp8Products(by_row)  # type: ignore[assignment]


class Fp8Products(Products):
    def __init__(self, by_row: bool) -> None:
        self.by_row = by_row
        self.gradients = E4M3 if by_row else E5M2

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return product(x.flatten(0, -2), weight.t(), self.by_row, fast=True).unflatten(0, x.shape[:-1])

    def of_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return product(grad.flatten(0, -2), weight, self.by_row, self.gradients).unflatten(0, grad.shape[:-1])

    def of_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        return product(grad.flatten(0, -2).t(), x.flatten(0, -2), self.by_row, self.gradients)

    def add_of_weight(self, weight: nn.Parameter, grad: Tensor, x: Tensor) -> None:
        found = self.of_weight(grad, x)
        weight.grad = found if weight.grad is None else weight.grad.add_(found)


class Fp8Linear(nn.Linear):
    products: Fp8Products

    def forward(self, x: Tensor) -> Tensor:
        y = fp8_linear(x, self.weight, self.products)
        return y if self.bias is None else y + self.bias


class Fp8RowLinear(RowLinear):
    products: Fp8Products

    def product(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.products)


def fp8_linear(x: Tensor, weight: Tensor, products: Fp8Products) -> Tensor:
    """x [..., I] times weight [O, I] → [..., O], all bf16. The plain reference is `torch.nn.functional.linear`."""
    return _Linear.apply(x, weight, products)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Fp8Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return products.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return ctx.products.of_input(grad, weight), ctx.products.of_weight(grad, x), None


def product(a: Tensor, b: Tensor, by_row: bool, kind: torch.dtype = E4M3, fast: bool = False) -> Tensor:
    """a [M, K] as `kind` times b [K, N] as e4m3 → bf16 [M, N].

    Args:
        by_row: a scale for each row of a and column of b; else one for each of the two.
        fast: sums may be kept in fewer bits on the way, on GPUs where that is faster.
    """
    a_scale, b_scale = scale(a, kind, 1 if by_row else None), scale(b, E4M3, 0 if by_row else None)
    a8, b8 = (a * a_scale).to(kind), (b * b_scale).to(E4M3)
    a_inverse, b_inverse = a_scale.float().reciprocal(), b_scale.float().reciprocal()
    if a.is_cpu:
        return (a8.bfloat16() @ b8.bfloat16() * a_inverse * b_inverse).bfloat16()  # powers of two: rounded once
    a8, b8 = a8.contiguous(), b8.t().contiguous().t()  # the kernel wants columns
    return torch._scaled_mm(a8, b8, a_inverse, b_inverse, out_dtype=torch.bfloat16, use_fast_accum=fast)


def scale(x: Tensor, kind: torch.dtype, dim: int | None) -> Tensor:
    """The largest power of two that keeps x within `kind`'s range, of all of x or along a dim, which stays as 1."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    _, exponent = torch.frexp(torch.finfo(kind).max / largest.float().clamp(min=TINY))
    return torch.ldexp(torch.ones_like(largest), exponent - 1)
