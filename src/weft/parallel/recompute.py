"""Recompute: keep less of the forward pass and do that part again in backward (Chen et al., 2016)."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""What `selective` keeps: matrix products, attention and what came over the network. The rest is cheap to do again."""


def recompute_blocks(blocks: nn.ModuleDict, kind: str) -> None:
    """Each block's forward keeps only its input ("full"), or also the results of KEPT ("selective")."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        # when compiled, torch warns on every process of in-place operations, which a block has none of
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks.values():
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
