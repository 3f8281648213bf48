"""weave: the one place where a plain model becomes a distributed one."""

from __future__ import annotations

import torch
from torch import nn

from weft.config.layout import Layout
from weft.config.precision import FP8
from weft.config.recompute import Recompute
from weft.models.cuts import even_split
from weft.models.decoder import Decoder
from weft.models.moe import MoE
from weft.models.shape import Shape
from weft.parallel.async_tp import overlap_tensors
from weft.parallel.chunk import Chunk
from weft.parallel.context import cut_sequence
from weft.parallel.deferral import defer_weights
from weft.parallel.experts import deal_experts
from weft.parallel.fp8 import use_fp8
from weft.parallel.loss import give_loss
from weft.parallel.mesh import Mesh
from weft.parallel.offload import offload_blocks
from weft.parallel.recompute import recompute_blocks
from weft.parallel.replicate import BUCKET_BYTES
from weft.parallel.shard import shard
from weft.parallel.tensor import cut_tensors
from weft.parallel.woven import Woven


def weave(shape: Shape, layout: Layout, mesh: Mesh, bucket: int = BUCKET_BYTES) -> Woven:
    """This process's part of the model, cut as `layout` says. Its weights are yet to be filled.

    Args:
        bucket: bytes of a message in which replicas add up their gradients.
    """
    blocks = layout.stage_blocks(shape)
    stages = layout.stages_of(mesh.index("pp"))
    chunks = {stage: weave_chunk(shape, layout, mesh, blocks[stage], bucket) for stage in stages}
    return Woven(shape, layout, mesh, chunks)


def weave_chunk(shape: Shape, layout: Layout, mesh: Mesh, blocks: range, bucket: int) -> Chunk:
    """One stage.

    The order matters. Stages come first: no other stage's blocks are ever made. Tensors are cut while the model has no
    memory. Matrices put their gradients off as they were cut. The compiler must see the recomputation; FSDP2's hooks stay
    outside both.
    """
    with torch.device("meta"):
        model = Decoder(shape, blocks)
    if layout.tp > 1:
        cut_tensors(model, mesh.group("tp"), layout.sp)
        model.tie()
    if layout.async_tp:
        overlap_tensors(model.blocks, mesh.group("tp"))
    if layout.precision in FP8:
        use_fp8(model.blocks, shape.num_layers, by_row=layout.precision == "fp8row")
    deferral = defer_weights(model) if layout.splits_backward else None
    if layout.loss == "chunked" and model.head is not None:
        first = even_split(shape.vocab, layout.tp, mesh.index("tp"))[0]
        give_loss(model.head, first, mesh.group("tp") if layout.tp > 1 else None)
    if shape.experts is not None:
        deal_experts(model, shape, layout, mesh)
    if layout.cp > 1:
        cut_sequence(model, mesh.group("cp"), layout.cp_kind, shape.sliding_window)
    recompute_blocks(model.blocks, Recompute.parse(layout.recompute), compiled=layout.compile)
    if layout.offload:
        offload_blocks(model.blocks)
    if layout.compile:
        compile_blocks(model.blocks)
    if layout.sharded:
        shard(model, mesh, layout)
    else:
        model.to_empty(device=mesh.device)
        model.tie()
    return Chunk(model, layout, mesh, deferral, bucket)


def compile_blocks(blocks: nn.ModuleDict) -> None:
    """One compiled function for all blocks: they differ in their weights only. Experts are left as they are, between two
    such functions: how many tokens each of them gets changes with every pass."""
    for block in blocks.values():
        mlp, has_experts = block.mlp, False
        if isinstance(mlp, MoE):
            mlp.forward, has_experts = torch.compiler.disable(mlp.forward), True  # type: ignore[method-assign]
        block.forward = torch.compile(block.forward, fullgraph=not has_experts, dynamic=False)
