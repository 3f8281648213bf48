"""Deferral: the backward pass of a matrix in two parts, that of its input at once and that of its weights later.

So zero-bubble schedules fill a pipeline's waiting time with products that nobody waits for (Qi et al., 2023). Whatever
else has weights — norms, biases, the embedding — gets its gradient in the first part, as always; so does the head, for
what its product is made of is as large as the logits, and would have to be kept.

Inside of a compiled block the product is one operation that the compiler does not look into. It cannot know whether a
backward pass puts off, so there it always does; where the schedule does not, Chunk catches up at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.models.head import Head
from weft.parallel.numbered import found, number_of
from weft.parallel.products import PLAIN, Products
from weft.parallel.tensor import RowLinear


class Deferral:
    """The products of one chunk that were put off, by micro-batch."""

    def __init__(self) -> None:
        self.queue: dict[int, list[tuple[Products, nn.Parameter, Tensor, Tensor]]] = {}
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

    def note(self, products: Products, weight: nn.Parameter, grad: Tensor, x: Tensor) -> None:
        assert self.current is not None
        self.queue[self.current].append((products, weight, grad, x))

    @torch.no_grad()
    def catch_up(self, micro_batch: int) -> None:
        """Add what was put off to the gradients, in the order of a backward pass."""
        for products, weight, grad, x in self.queue.pop(micro_batch):
            products.add_of_weight(weight, grad, x)


def defer_weights(model: nn.Module) -> Deferral:
    """Let the matrices of the model's blocks put their gradients off when they are told to."""
    deferral = Deferral()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Head):
            module.__class__ = DeferredRowLinear if isinstance(module, RowLinear) else DeferredLinear
            module.deferral = deferral  # type: ignore[assignment]
            if not hasattr(module, "products"):  # fp8 has its own
                module.products = PLAIN  # type: ignore[assignment]
            module.number = number_of(module)
    return deferral


class DeferredLinear(nn.Linear):
    deferral: Deferral
    products: Products
    number: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = deferred(x, self)
        return y if self.bias is None else y + self.bias


class DeferredRowLinear(RowLinear):
    deferral: Deferral
    products: Products
    number: Tensor

    def product(self, x: Tensor) -> Tensor:
        return deferred(x, self)


def deferred(x: Tensor, module: DeferredLinear | DeferredRowLinear) -> Tensor:
    """x [..., I] times the module's weight [O, I] → [..., O]. The plain reference is `torch.nn.functional.linear`."""
    if not torch.is_grad_enabled():
        return module.products.forward(x, module.weight)
    if torch.compiler.is_compiling():
        return torch.ops.weft.deferred_linear(x, module.weight, module.number)
    return _Linear.apply(x, module.weight, module.deferral, module.products)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, deferral: Deferral, products: Products) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferral, ctx.products = weight, deferral, products
        return products.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        x_grad = ctx.products.of_input(grad, ctx.weight)
        if ctx.deferral.current is not None:
            ctx.deferral.note(ctx.products, ctx.weight, grad, x)
            return x_grad, None, None, None
        return x_grad, ctx.products.of_weight(grad, x), None, None


# -- the same as one operation, for compiled blocks ------------------------------------------------------------------


def _module(number: Tensor) -> DeferredLinear | DeferredRowLinear:
    module = found(number)
    assert isinstance(module, DeferredLinear | DeferredRowLinear)
    return module


def _product(x: Tensor, weight: Tensor, number: Tensor) -> Tensor:
    return _module(number).products.forward(x, weight)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, number: Tensor) -> Tensor:
    module = _module(number)
    # under FSDP2 the module has its gathered weight now; `weight` is the same memory under another name
    module.deferral.note(module.products, cast(nn.Parameter, module.weight), _copy(grad), _copy(x))
    return module.products.of_input(grad, weight)


def _copy(x: Tensor) -> Tensor:
    """The compiler uses the memory of what it has read for the last time again for something else."""
    return x.clone()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.weft.deferred_linear_backward(grad, *ctx.saved_tensors), None, None


_LIBRARY = torch.library.Library("weft", "FRAGMENT")
_LIBRARY.define("deferred_linear(Tensor x, Tensor weight, Tensor number) -> Tensor")
_LIBRARY.define("deferred_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor number) -> Tensor")
_LIBRARY.impl("deferred_linear", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("deferred_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "weft::deferred_linear", lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_LIBRARY
)
torch.library.register_fake(
    "weft::deferred_linear_backward", lambda grad, x, weight, _: x.new_empty(x.shape), lib=_LIBRARY
)
torch.library.register_autograd("weft::deferred_linear", _gradients, setup_context=_keep, lib=_LIBRARY)
