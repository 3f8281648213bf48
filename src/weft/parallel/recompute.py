"""Recompute: keep less of the forward pass and do that part again in backward (Chen et al., 2016)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import weft.parallel.context  # noqa: F401 (defines weft.context_attention)
from weft.config.recompute import Recompute
from weft.models.moe import MoE

aten, network = torch.ops.aten, torch.ops._c10d_functional

OPERATIONS = {
    "matmul": {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default},
    "attention": {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.weft.context_attention.default,
    },
    "network": {
        network.all_reduce.default,
        network.all_gather_into_tensor.default,
        network.reduce_scatter_tensor.default,
        network.all_to_all_single.default,
    },
}
"""What of a block may be kept. The rest is cheap to do again."""


def recompute_blocks(blocks: nn.ModuleDict, recompute: Recompute) -> None:
    """Wrap the forward pass of the blocks, or of their parts, that is to be computed again in backward."""
    modules = list(blocks.values())
    for index in recompute.blocks(len(modules)):
        for module, method, function in _parts(modules[index], recompute.redone):
            again = functools.partial(checkpoint, function, **_options(recompute.keeps))
            setattr(module, method, again)


def _parts(block: Any, redone: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, Callable[..., Tensor]]]:
    """Modules and their methods: of attention and the MLP those of `Block`, which have the norm in them, and under sp what
    gathers their input."""
    if not redone:
        yield block, "forward", block.forward
    if "attention" in redone:
        yield block, "mixed", block.mixed
    if "mlp" in redone:
        yield block, "fed", block.fed
    if "experts" in redone and isinstance(block.mlp, MoE):
        experts = block.mlp.experts
        # no module is entered again: the class's method is looked up each time, for profiles and exact plans wrap it
        yield experts, "compute", lambda *given: type(experts).compute(experts, *given)


def _options(keeps: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keeps:
        # when compiled, torch warns on every process of in-place operations, which a block has none of
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        kept = frozenset[Any]().union(*(OPERATIONS[name] for name in keeps))
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, functools.partial(_policy, kept)
        )
    return options


def _policy(kept: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
