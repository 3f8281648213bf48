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
        indices: of the blocks on this stage.
        first, last: whether it has the embedding, and the head with the loss.
        blocks: parameters of each block, cut over tp alone.
        root: parameters outside of the blocks, cut over tp alone.
        table: of them, one matrix of V·D: the token embedding or the head.
        block_shards, root_shard: the same, cut over fsdp too.
    """

    index: int
    indices: range
    first: bool
    last: bool
    blocks: tuple[int, ...]
    root: int
    table: int
    block_shards: tuple[int, ...]
    root_shard: int
    matrix_shard: int

    @property
    def num_blocks(self) -> int:
        return len(self.indices)

    @property
    def block(self) -> int:
        """Of the largest block."""
        return max(self.blocks)

    @property
    def block_shard(self) -> int:
        return max(self.block_shards)

    @property
    def params(self) -> int:
        """Parameters cut over tp alone: what is there when FSDP has gathered them all."""
        return sum(self.blocks) + self.root

    @property
    def shard(self) -> int:
        """Parameters that this process keeps."""
        return sum(self.block_shards) + self.root_shard


def stages(shape: Shape, layout: Layout) -> list[Stage]:
    """Every stage of the layout, in order."""
    parts = layout.stage_blocks(shape.num_layers)
    kinds = {shape.has_experts(block): block for block in range(shape.num_layers)}  # one block of each kind
    sizes = {
        kind: {f"blocks.{block}.{name}": dims for name, dims in block_sizes(shape, block).items()}
        for kind, block in kinds.items()
    }
    whole = {kind: _block(block, layout, 1, 1) for kind, block in sizes.items()}
    ways = layout.weight_ways[1], layout.expert_ways[1]
    shards = {kind: _block(block, layout, *ways) for kind, block in sizes.items()}
    matrices = {
        name: dims
        for name, dims in sizes[shape.has_experts(shape.num_layers - 1)].items()
        if len(dims) == 2 and ".experts." not in name
    }
    table = {"embed.weight": (shape.vocab, shape.hidden)}
    found = []
    for index, blocks in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        root = _root_sizes(shape, first, last)
        found.append(
            Stage(
                index=index,
                indices=blocks,
                first=first,
                last=last,
                blocks=tuple(whole[shape.has_experts(block)] for block in blocks),
                root=held(root, layout.tp),
                table=held(table, layout.tp),
                block_shards=tuple(shards[shape.has_experts(block)] for block in blocks),
                root_shard=held(root, layout.tp, layout.weight_ways[1]),
                matrix_shard=held(matrices, layout.tp, layout.weight_ways[1]),
            )
        )
    return found


def _block(sizes: Sizes, layout: Layout, shards: int, expert_shards: int) -> int:
    """Numbers of one block: its experts are dealt out and sharded in their own ways, each matrix stacked over them."""
    rest = {name: dims for name, dims in sizes.items() if ".mlp.experts." not in name}
    experts = [dims for name, dims in sizes.items() if name not in rest]
    rows = sum(rows for rows, _ in experts) // EXPERT_MATRICES // (layout.ep * layout.expert_tp)
    return held(rest, layout.tp, shards) + EXPERT_MATRICES * -(-rows // expert_shards) * (
        experts[0][1] if experts else 0
    )


EXPERT_MATRICES = 3
"""Of each expert: gate, up, down."""


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
