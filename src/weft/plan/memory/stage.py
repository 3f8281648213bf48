"""What one process of a pipeline stage holds of the parameters, in numbers. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod

from weft.config.layout import Layout
from weft.models.cuts import cut_dim, even_split
from weft.models.parameters import block_sizes
from weft.models.shape import Shape

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stage:
    """The first of the processes that share a place in the pipeline, along tp and fsdp: nobody there holds more.

    Attributes:
        index: of the place, from 0.
        stages: number of each of its stages in the model → the blocks there. Most schedules give a process one.
        first, last: whether it has the embedding, and the head with the loss.
        blocks: parameters of each block, cut over tp alone.
        experts: of them, those of experts, which are dealt out over ep.
        root: parameters outside of the blocks, cut over tp alone.
        table: of them, one matrix of V·D: the token embedding or the head.
        block_shards, expert_shards, root_shard: the same, cut over fsdp too.
        muon_shard, vector_shard: of them, the matrices that Muon can update, and all vectors.
        matrices: what those have whole: numbers of a matrix → how many matrices there are.
    """

    index: int
    stages: Mapping[int, range]
    first: bool
    last: bool
    blocks: tuple[int, ...]
    experts: tuple[int, ...]
    root: int
    table: int
    block_shards: tuple[int, ...]
    expert_shards: tuple[int, ...]
    root_shard: int
    muon_shard: int
    vector_shard: int
    matrices: dict[int, int]

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.stages.values()))

    def share(self, stages: Collection[int]) -> float:
        """Of its parameters, what these stages have."""
        blocks = iter(self.blocks)
        sizes = {stage: sum(islice(blocks, len(range_))) for stage, range_ in self.stages.items()}
        ends = [min(sizes)] * self.first + [max(sizes)] * self.last
        for stage in ends:
            sizes[stage] += self.root // len(ends)
        return sum(sizes[stage] for stage in stages) / sum(sizes.values())

    @property
    def indices(self) -> list[int]:
        """Of its blocks in the model."""
        return [block for blocks in self.stages.values() for block in blocks]

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
    """Every place of the layout's pipeline, in order."""
    parts = layout.stage_blocks(shape)
    kinds = {shape.has_experts(block): block for block in range(shape.num_layers)}  # one block of each kind
    sizes = {
        kind: {f"blocks.{block}.{name}": dims for name, dims in block_sizes(shape, block).items()}
        for kind, block in kinds.items()
    }
    whole = {kind: _block(block, layout, 1, 1) for kind, block in sizes.items()}
    experts = {kind: _experts(block, layout, 1) for kind, block in sizes.items()}
    ways = layout.weight_ways[1], layout.expert_ways[1]
    shards = {kind: _block(block, layout, *ways) for kind, block in sizes.items()}
    expert_shards = {kind: _experts(block, layout, ways[1]) for kind, block in sizes.items()}
    matrices = {
        kind: {name: dims for name, dims in block.items() if len(dims) == 2 and ".router." not in name}
        for kind, block in sizes.items()
    }
    muon = {kind: _block(block, layout, *ways) for kind, block in matrices.items()}
    vectors = {kind: {name: dims for name, dims in block.items() if len(dims) == 1} for kind, block in sizes.items()}
    table = {"embed.weight": (shape.vocab, shape.hidden)}
    found = []
    for index in range(layout.pp):
        mine = layout.stages_of(index)
        first, last = 0 in mine, len(parts) - 1 in mine
        root = _root_sizes(shape, first, last, shape.tied and layout.pp == 1)
        kinds_here = [shape.has_experts(block) for stage in mine for block in parts[stage]]
        small = [vectors[kind] for kind in kinds_here]
        small.append({name: dims for name, dims in root.items() if len(dims) == 1})
        found.append(
            Stage(
                index=index,
                stages={stage: parts[stage] for stage in mine},
                first=first,
                last=last,
                blocks=tuple(whole[kind] for kind in kinds_here),
                experts=tuple(experts[kind] for kind in kinds_here),
                root=held(root, layout.tp),
                table=held(table, layout.tp),
                block_shards=tuple(shards[kind] for kind in kinds_here),
                expert_shards=tuple(expert_shards[kind] for kind in kinds_here),
                root_shard=held(root, layout.tp, layout.weight_ways[1]),
                muon_shard=sum(muon[kind] for kind in kinds_here),
                vector_shard=sum(held(part, layout.tp, layout.weight_ways[1]) for part in small),
                matrices=dict(Counter(prod(dims) for kind in kinds_here for dims in matrices[kind].values())),
            )
        )
    return found


def _block(sizes: Sizes, layout: Layout, shards: int, expert_shards: int) -> int:
    """Numbers of one block: its experts are dealt out and sharded in their own ways, each matrix stacked over them."""
    rest = {name: dims for name, dims in sizes.items() if EXPERTS not in name}
    return held(rest, layout.tp, shards) + _experts(sizes, layout, expert_shards)


def _experts(sizes: Sizes, layout: Layout, shards: int) -> int:
    """Numbers of one block's experts."""
    experts = [dims for name, dims in sizes.items() if EXPERTS in name]
    rows = sum(rows for rows, _ in experts) // EXPERT_MATRICES // (layout.ep * layout.expert_tp)
    return EXPERT_MATRICES * -(-rows // shards) * (experts[0][1] if experts else 0)


EXPERTS = ".mlp.experts."
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


def _root_sizes(shape: Shape, first: bool, last: bool, one_table: bool) -> Sizes:
    """What a process holds outside of its blocks. Only where there is no pipeline is a tied head the embedding itself."""
    sizes: dict[str, tuple[int, ...]] = {}
    if first:
        sizes["embed.weight"] = (shape.vocab, shape.hidden)
        if shape.positions == "learned":
            sizes["positions.weight"] = (shape.max_seq, shape.hidden)
    if last:
        sizes["norm.weight"] = (shape.hidden,)
        if shape.norm == "layernorm":
            sizes["norm.bias"] = (shape.hidden,)
        if not one_table:
            sizes["head.weight"] = (shape.vocab, shape.hidden)
    return sizes
