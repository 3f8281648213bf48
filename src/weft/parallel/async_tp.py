"""Asynchronous tensor parallelism: a product and the message beside it, in pieces, one under the other.

Under sp, what enters a region is gathered and multiplied by its column matrices; what its row matrix gives is scattered.
On GPUs with NVLink torch does each pair in one operation, through symmetric memory: while one piece is multiplied, the
next is on its way (Wang et al., Overlap Communication with Dependent Computation via Decomposition, 2023). Elsewhere the
same functions do one after the other, which is what they are compared with.

All column matrices of a region share one gathering, so their products are made where the region is entered. Each waits
in its module until the model's code asks for it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines symm_mem's operations
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.models.attention import Attention
from weft.models.mlp import GeluMLP, SwigluMLP
from weft.parallel.collectives import all_gather_sequence, reduce_scatter_sequence
from weft.parallel.products import PLAIN
from weft.parallel.tensor import RowLinear


def columns_of(region: nn.Module) -> list[nn.Linear]:
    """The matrices that multiply what enters, and nothing else; none where the model is made in another way."""
    if isinstance(region, Attention):
        return [region.q, region.k, region.v]
    if isinstance(region, SwigluMLP):
        return [region.gate, region.up]
    return [region.up] if isinstance(region, GeluMLP) else []


class Entrance:
    """Forward pre-hook of a region: x [B, T/n, D] comes whole, [B, T, D], and its products with it."""

    def __init__(self, group: dist.ProcessGroup, columns: list[nn.Linear]) -> None:
        for column in columns:
            column.__class__ = ReadyLinear
        self.group, self.columns = group, columns

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        x, *products = GatherProducts.apply(args[0], self.group, *(column.weight for column in self.columns))
        for column, product in zip(self.columns, products, strict=True):
            column.ready = product
        return x, *args[1:]


class ReadyLinear(nn.Linear):
    """Its product lies there already."""

    ready: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y, self.ready = self.ready, None
        assert y is not None
        return y if self.bias is None else y + self.bias


class ScatteredLinear(RowLinear):
    """Its product is scattered in pieces, as they are made."""

    def forward(self, x: Tensor) -> Tensor:
        y = ScatterProduct.apply(x, self.weight, self.axis.group)
        return y if self.bias is None else y + self.bias


class GatherProducts(torch.autograd.Function):
    """x [B, T/n, I] of each process, weights [O, I] → x [B, T, I], and its products [B, T, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        whole, products = gather_products(x, [weight.t() for weight in weights], group)
        ctx.group = group
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, *weights)
        return whole, *products

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        mine = scatter_product(torch.cat(grads, dim=-1), torch.cat(weights), ctx.group)
        if grad_x is not None:
            mine += reduce_scatter_sequence(grad_x, ctx.group)
        return mine, None, *(PLAIN.of_weight(grad, x) for grad in grads)


class ScatterProduct(torch.autograd.Function):
    """x [B, T, I], weight [O, I], a share of the sum → this process's part of the whole sum, [B, T/n, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return scatter_product(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole, [x_grad] = gather_products(grad, [weight], ctx.group)
        return x_grad, PLAIN.of_weight(whole, x), None


def gather_products(x: Tensor, matrices: list[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, list[Tensor]]:
    """x [B, T/n, I] of each process, matrices [I, O] → the whole x [B, T, I], and x · matrix [B, T, O] of each."""
    if x.is_cuda:
        return torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), matrices, 1, group.group_name)
    whole = all_gather_sequence(x, group)
    return whole, [whole @ matrix for matrix in matrices]


def scatter_product(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [B, T, I] · matrix [I, O], summed over processes → this one's part of the sequence, [B, T/n, O]."""
    if x.is_cuda:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), matrix, "sum", 1, group.group_name)
    return reduce_scatter_sequence(x @ matrix, group)


def overlap_tensors(blocks: nn.ModuleDict, group: dist.ProcessGroup) -> None:
    """Let attention and dense MLPs of blocks that are cut already do so. Latent attention and experts stay as they are."""
    for name, region in blocks.named_modules():
        if name.count(".") == 1 and (columns := columns_of(region)):  # 3.attention, and not 3.mlp.shared
            cast(RemovableHandle, region.entrance).remove()
            region.register_forward_pre_hook(Entrance(group, columns))
            for module in region.children():
                if isinstance(module, RowLinear):
                    module.__class__ = ScatteredLinear
