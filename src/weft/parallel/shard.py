"""ZeRO: weights, gradients and optimizer states sharded over the fsdp axis (Rajbhandari et al., 2020), by FSDP2.

In low precision FSDP2 keeps fp32 weights and gradients and hands the model bf16 or fp16 copies; where nothing is cut,
parallel/lowered.py does. What it adds up before a reduction, and the reduction itself, are in `layout.gradients`; sums
that are reduced are fp32 always.

With `layout.offload_weights` this process's share of all that lies in the CPU's memory (Rajbhandari et al., ZeRO-Infinity,
2021), where the optimizer works; a block's share travels to the device when the block is gathered.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from weft.config.layout import Layout
from weft.models.decoder import Decoder
from weft.models.dtypes import DTYPES
from weft.models.moe import Experts, MoE
from weft.parallel.mesh import Mesh


def shard(model: Decoder, mesh: Mesh, layout: Layout) -> None:
    """Shard each block, then what is left, over fsdp (and cp); replicate over dp (HSDP) where both are cut.

    The model comes on meta. One block at a time gets its memory and gives back all but its share.
    """
    axes = ("replicate", "shard") if layout.weight_ways[0] > 1 else ("shard",)
    expert_axes = ("expert_replicate", "expert_shard") if layout.expert_ways[0] > 1 else ("expert_shard",)
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[layout.compute],
        reduce_dtype=DTYPES[layout.gradients],
        cast_forward_inputs=False,  # rope tables stay fp32
    )
    keep = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if layout.offload_weights else OffloadPolicy()
    # with nothing to gather, giving the low-precision copy back early would only mean to make it again
    reshard = layout.zero == 3 and layout.fsdp > 1
    for block in model.blocks.values():
        block.to_empty(device=mesh.device)
        if isinstance(block.mlp, MoE):  # dealt out already, experts have fewer holders than the rest
            fully_shard(
                block.mlp.experts, mesh=mesh.experts[expert_axes], mp_policy=policy, reshard_after_forward=reshard,
                offload_policy=keep,
            )  # fmt: skip
        fully_shard(
            block, mesh=mesh.weights[axes], mp_policy=policy, reshard_after_forward=reshard, offload_policy=keep
        )
    for name, module in model.named_children():
        if name != "blocks":
            module.to_empty(device=mesh.device)
    model.tie()
    fully_shard(model, mesh=mesh.weights[axes], mp_policy=policy, reshard_after_forward=False, offload_policy=keep)
    for module in model.modules():
        copies, shards = layout.expert_ways if isinstance(module, Experts) else layout.weight_ways
        if isinstance(module, FSDPModule):
            # the loss is already divided by the tokens of the global batch: gradients add up
            if copies * shards > 1:  # alone, FSDP2 would really divide every gradient by one
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if reshard:
        gather_ahead(list(model.blocks.values()))


def gather_ahead(blocks: list[nn.Module]) -> None:
    """Ask for the weights of the next block before one with experts begins.

    FSDP2 asks for what it comes to, which is early enough where the host runs ahead of the GPU. At experts it has to wait
    for the GPU, to learn how many tokens travel, and what it would ask for then comes too late. In backward, where
    nobody waits, FSDP2 is one step ahead by itself.
    """
    for block, following in pairwise(blocks):
        if isinstance(block.mlp, MoE):
            assert isinstance(block, FSDPModule)
            block.set_modules_to_forward_prefetch([m for m in following.modules() if isinstance(m, FSDPModule)])


def prepare_backward(model: FSDPModule, layout: Layout, last: bool) -> None:
    """What FSDP2 is to do in the backward pass of one micro-batch, the step's last or not.

    ZeRO-1 reduces gradients once a step, ZeRO-2 and -3 in every pass; replicas (dp) agree once a step.
    """
    model.set_is_last_backward(last)
    model.set_requires_gradient_sync(last or layout.zero > 1)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or (layout.zero == 3 and layout.fsdp > 1))


def hold_gradients(model: FSDPModule, layout: Layout) -> None:
    """FSDP2 is to keep the gradients of the next backward pass as they come: some are put off until `reduce_held`."""
    model.set_is_last_backward(False)
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(layout.zero == 3 and layout.fsdp > 1)


def reduce_held(model: FSDPModule, layout: Layout) -> None:
    """What FSDP2 does at the end of a backward pass, as `prepare_backward` said, for gradients that came without one.

    Weights need not be gathered for it.
    """
    copies = layout.weight_ways[0] > 1 or layout.expert_ways[0] > 1  # of dp, or without fsdp of cp
    state = fully_shard.state(model)  # type: ignore[attr-defined]
    for member in state._state_ctx.all_states:
        for weight in (weight for group in _groups(member) for weight in group.fsdp_params):
            found = weight.unsharded_accumulated_grad is not None or weight.unsharded_param.grad is not None
            if copies and layout.zero > 1 and not found:
                # sums over fsdp wait in one flat tensor for the sum over copies: every pass must bring the same weights
                weight.unsharded_param.grad = torch.zeros_like(weight.unsharded_param)
            # all in the dtype of the reduction, whether they came at once or were put off
            weight.accumulate_unsharded_grad_if_needed()
            weight.to_accumulated_grad_if_needed()
    state._root_post_backward_final_callback()


def _groups(state: Any) -> list[Any]:
    """torch 2.11 has one group of parameters or none, later ones a list."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []
