"""What one process of a pipeline stage holds of the parameters, in numbers. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from weft.config.layout import Layout
from weft.models.cuts import cut_dim, even_split
from weft.models.parameters import block_sizes
from weft.models.shape import Shape

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stage:
    """The first process of a stage along tp and fsdp: nobody there holds more.

    Attributes:
        index: of the stage, from 0.
        num_blocks: on this stage.
        first, last: whether it has the embedding, and the head with the loss.
        block: parameters of one block, cut over tp alone.
        root: parameters outside of the blocks, cut over tp alone.
        table: of them, one matrix of V·D: the token embedding or the head.
        block_shard, root_shard: the same, cut over fsdp too.
        matrix_shard: of block_shard, those in matrices.
    """

    index: int
    num_blocks: int
    first: bool
    last: bool
    block: int
    root: int
    table: int
    block_shard: int
    root_shard: int
    matrix_shard: int

    @property
    def params(self) -> int:
        """Parameters cut over tp alone: what is there when FSDP has gathered them all."""
        return self.num_blocks * self.block + self.root

    @property
    def shard(self) -> int:
        """Parameters that this process keeps."""
        return self.num_blocks * self.block_shard + self.root_shard


def stages(shape: Shape, layout: Layout) -> list[Stage]:
    """Every stage of the layout, in order."""
    parts = layout.stage_blocks(shape.num_layers)
    block = {f"blocks.0.{name}": dims for name, dims in block_sizes(shape).items()}
    matrices = {name: dims for name, dims in block.items() if len(dims) == 2}
    table = {"embed.weight": (shape.vocab, shape.hidden)}
    found = []
    for index, blocks in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        root = _root_sizes(shape, first, last)
        found.append(
            Stage(
                index=index,
                num_blocks=len(blocks),
                first=first,
                last=last,
                block=held(block, layout.tp),
                root=held(root, layout.tp),
                table=held(table, layout.tp),
                block_shard=held(block, layout.tp, layout.weight_ways[1]),
                root_shard=held(root, layout.tp, layout.weight_ways[1]),
                matrix_shard=held(matrices, layout.tp, layout.weight_ways[1]),
            )
        )
    return found


def held(sizes: Sizes, tp: int, fsdp: int = 1) -> int:
    """Numbers that the first process of the tp and fsdp axes holds of these parameters."""
    total = 0
    for name, dims in sizes.items():
        share = list(dims)
        dim = cut_dim(name)
        if dim is not None:
            start, stop = even_split(dims[dim], tp, 0)
            share[dim] = stop - start
        share[0] = -(-share[0] // fsdp)  # FSDP2 cuts rows into equal chunks, rounded up
        total += prod(share)
    return total


def _root_sizes(shape: Shape, first: bool, last: bool) -> Sizes:
    """What a stage holds outside of its blocks. A tied head is a second table where it is not the embedding's own."""
    sizes: dict[str, tuple[int, ...]] = {}
    if first:
        sizes["embed.weight"] = (shape.vocab, shape.hidden)
        if shape.positions == "learned":
            sizes["positions.weight"] = (shape.max_seq, shape.hidden)
    if last:
        sizes["norm.weight"] = (shape.hidden,)
        if shape.norm == "layernorm":
            sizes["norm.bias"] = (shape.hidden,)
        if not (shape.tied and first):
            sizes["head.weight"] = (shape.vocab, shape.hidden)
    return sizes
