"""Deferral: the backward pass of a matrix in two parts, that of its input at once and that of its weights later.

So zero-bubble schedules fill a pipeline's waiting time with products that nobody waits for (Qi et al., 2023). Whatever
else has weights — norms, biases, the embedding — gets its gradient in the first part, as always; so does the head, for
what its product is made of is as large as the logits, and would have to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.head import Head
from weft.parallel.tensor import RowLinear


class Deferral:
    """The products of one chunk that were put off, by micro-batch."""

    def __init__(self) -> None:
        self.queue: dict[int, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        self.current: int | None = None

    @contextmanager
    def put_off(self, micro_batch: int) -> Iterator[None]:
        """Inside, backward passes leave out the gradients of matrices, and note what they are made of."""
        self.current = micro_batch
        self.queue[micro_batch] = []
        try:
            yield
        finally:
            self.current = None

    def note(self, weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        assert self.current is not None
        self.queue[self.current].append((weight, x, grad))

    @torch.no_grad()
    def catch_up(self, micro_batch: int) -> None:
        """Add what was put off to the gradients, in the order of a backward pass."""
        for weight, x, grad in self.queue.pop(micro_batch):
            rows, columns = grad.flatten(0, -2).t(), x.flatten(0, -2)
            if weight.grad is None:
                weight.grad = rows @ columns
            else:
                weight.grad.addmm_(rows, columns)


def defer_weights(model: nn.Module) -> Deferral:
    """Let the matrices of the model's blocks put their gradients off when they are told to."""
    deferral = Deferral()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Head):
            module.__class__ = DeferredRowLinear if isinstance(module, RowLinear) else DeferredLinear
            module.deferral = deferral  # type: ignore[assignment]
    return deferral


class DeferredLinear(nn.Linear):
    deferral: Deferral

    def forward(self, x: Tensor) -> Tensor:
        y = deferred(x, self.weight, self.deferral)
        return y if self.bias is None else y + self.bias


class DeferredRowLinear(RowLinear):
    deferral: Deferral

    def product(self, x: Tensor) -> Tensor:
        return deferred(x, self.weight, self.deferral)


def deferred(x: Tensor, weight: Tensor, deferral: Deferral) -> Tensor:
    """x [..., I] times weight [O, I] → [..., O]. The plain reference is `torch.nn.functional.linear`."""
    return _Linear.apply(x, weight, deferral) if torch.is_grad_enabled() else F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, deferral: Deferral) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferral = weight, deferral
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if ctx.deferral.current is not None:
            ctx.deferral.note(ctx.weight, x, grad)
            return grad @ ctx.weight, None, None
        return grad @ ctx.weight, grad.flatten(0, -2).t() @ x.flatten(0, -2), None
