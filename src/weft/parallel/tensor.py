"""Tensor and sequence parallelism: every process holds a share of each matrix (Shoeybi et al., Megatron-LM, 2019).

A cut model's parameters are plain, smaller tensors; where they lie in the whole is `places`, kept beside the model. The
model's own code runs unchanged: attention works on as many heads as its matrices have. What changes are the edges of
each region — what enters is copied (or, under sp, gathered), what its row matrix returns is summed (or scattered).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.cuts import cut_dim, cut_of, even_split
from weft.models.moe import MoE
from weft.parallel.collectives import CopyToAxis, GatherSequence, ScatterSequence, SumOverAxis


@dataclass(frozen=True)
class Axis:
    """The tp axis as the cut modules see it."""

    group: dist.ProcessGroup
    sp: bool

    def enter(self, x: Tensor) -> Tensor:
        """What every process needs whole: gradients of their shares add up on the way back."""
        return GatherSequence.apply(x, self.group) if self.sp else CopyToAxis.apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sum of the shares; under sp each process keeps its part of the sequence."""
        return ScatterSequence.apply(x, self.group) if self.sp else SumOverAxis.apply(x, self.group)


class RowLinear(nn.Linear):
    """A share of the columns. The bias, whole on every process, is added once, after the sum."""

    axis: Axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.axis.leave(self.product(x))
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class VocabEmbedding(nn.Embedding):
    """Rows `first` and on of the vocabulary; other tokens give zeros here and their vector on another process."""

    axis: Axis
    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.first
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self.axis.leave(x.masked_fill(elsewhere.unsqueeze(-1), 0))


class SequenceEmbedding(nn.Embedding):
    """Positions of this process's part of the sequence."""

    axis: Axis

    def forward(self, positions: Tensor) -> Tensor:
        group = self.axis.group
        return F.embedding(positions.chunk(group.size(), dim=-1)[group.rank()], self.weight)


def cut_tensors(model: nn.Module, group: dist.ProcessGroup, sp: bool) -> None:
    """Replace every parameter by this process's share of it, and join the shares where they meet. Model on meta."""
    axis = Axis(group, sp)
    enter = _Entrance(axis)
    for name, module in model.named_modules():
        cut = cut_of(name)
        if cut == "region" and isinstance(module, MoE):
            continue  # parallel/experts.py
        if cut in ("region", "head"):
            module.entrance = module.register_forward_pre_hook(enter)
        elif cut == "row":
            module.__class__ = RowLinear
        elif cut == "vocab":
            module.__class__ = VocabEmbedding
            module.first = even_split(module.num_embeddings, group.size(), group.rank())[0]
        elif cut == "table" and sp:
            module.__class__ = SequenceEmbedding
        module.axis = axis
        for kind, parameter in list(module.named_parameters(recurse=False)):
            dim = cut_dim(f"{name}.{kind}")
            if dim is not None:
                start, stop = even_split(parameter.shape[dim], group.size(), group.rank())
                share = torch.empty_like(parameter.narrow(dim, start, stop - start))
                setattr(module, kind, nn.Parameter(share))


class _Entrance:
    """Forward pre-hook of a region. One object for all regions: the compiler sees one function, and compiles once."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return self.axis.enter(args[0]), *args[1:]
