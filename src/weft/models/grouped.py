"""Products of rows that are sorted by group, each group with a matrix of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16
"""Bytes that the rows of every operand of torch's kernel begin at a multiple of."""


def grouped_mm(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """x [R, I], matrices [X, I, O] → [R, O]: the first `counts[0]` rows times the first matrix, and so on.

    Args:
        counts: rows of each group, [X]; they add up to R, and any may be 0.
    """
    sizes = (x.shape[-1], matrices.shape[-1])
    if x.is_cuda and x.dtype == torch.bfloat16 and all(size * x.itemsize % ALIGNED == 0 for size in sizes):
        return F.grouped_mm(x, matrices, offs=counts.cumsum(0, dtype=torch.int32))
    return _GroupedMM.apply(x, matrices, counts.tolist())


class _GroupedMM(torch.autograd.Function):
    """One product after the other, each into its place: on a CPU as fast as torch's kernel, and on it for any dtype.

    The plain reference is `x[start:stop] @ matrices[group]` of each group.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, matrices)
        ctx.counts = counts
        y = x.new_empty(len(x), matrices.shape[-1])
        for rows, matrix, out in zip(x.split(counts), matrices, y.split(counts), strict=True):
            torch.mm(rows, matrix, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, matrices = ctx.saved_tensors
        x_grad, matrices_grad = (
            torch.empty_like(x),
            torch.empty_like(matrices),
        )  # the latter in the matrices' own strides
        parts = (x.split(ctx.counts), grad.split(ctx.counts), matrices, x_grad.split(ctx.counts), matrices_grad)
        for rows, grads, matrix, rows_grad, matrix_grad in zip(*parts, strict=True):
            torch.mm(grads, matrix.t(), out=rows_grad)
            torch.mm(rows.t(), grads, out=matrix_grad)  # of no rows: zeros
        return x_grad, matrices_grad, None
