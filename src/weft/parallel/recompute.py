"""Recompute: keep less of the forward pass and do that part again in backward (Chen et al., 2016)."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import weft.parallel.context  # noqa: F401 (defines weft.context_attention)
from weft.config.recompute import Recompute

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


METHODS = {"attention": "mixed", "mlp": "fed"}
"""A part of a block → the method of `Block` that is computed again: with its norm, and under sp what gathers its input."""


def recompute_blocks(blocks: nn.ModuleDict, recompute: Recompute) -> None:
    """Wrap the forward pass of the blocks, or of their parts, that is to be computed again in backward."""
    modules = list(blocks.values())
    for index in recompute.blocks(len(modules)):
        block = modules[index]
        for method in [METHODS[name] for name in recompute.redone] or ["forward"]:
            setattr(block, method, functools.partial(checkpoint, getattr(block, method), **_options(recompute.keeps)))


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
