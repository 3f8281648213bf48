"""Woven: one process's part of a distributed model, and its passes over the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from weft.checkpoint.region import Piece, Region
from weft.checkpoint.stacked import Part, stacked_parts
from weft.config.layout import Layout
from weft.models.cuts import cut_dim, even_split, partial_gradient
from weft.models.decoder import Decoder
from weft.models.parameters import is_stacked, parameter_sizes
from weft.models.shape import Shape
from weft.parallel.experts import held_experts
from weft.parallel.headtail import own_tokens
from weft.parallel.loss import cross_entropy_sum
from weft.parallel.mesh import Mesh
from weft.parallel.pipeline import Pipeline
from weft.parallel.replicate import replicate
from weft.parallel.schedule import Op, stage_ops
from weft.parallel.shard import DTYPES, prepare_backward


@dataclass(frozen=True)
class Rows:
    """Sequences of one process, as tensors [B, T]; targets may be IGNORED, see parallel/loss.py.

    Of `part`, a process's part of their tokens, [B, T/n], `documents` are still those of whole sequences.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None

    def split(self, size: int) -> list[Rows]:
        """Micro-batches of `size` sequences."""

        def cut(x: Tensor | None) -> list[Tensor | None]:
            return list(x.split(size)) if x is not None else [None] * (len(self.tokens) // size)

        fields = zip(*map(cut, (self.tokens, self.targets, self.positions, self.documents)), strict=True)
        return [Rows(*parts) for parts in fields]

    def part(self, ways: int, index: int) -> Rows:
        """What one process of the cp axis works on, of sequences cut so many ways."""
        if ways == 1:
            return self
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        positions = positions if self.positions is None else self.positions
        tokens, targets, positions = (own_tokens(x, ways, index) for x in (self.tokens, self.targets, positions))
        return Rows(tokens, targets, positions, self.documents)


class Weight:
    """One parameter as this process holds it.

    `data` and `grad` are plain tensors: this process's share. `parts` says where its rows lie in the whole model: a
    region of the parameter, or, where experts are stacked, one for each expert.
    """

    def __init__(self, name: str, parts: list[Part], parameter: nn.Parameter, writes: bool, partial: bool) -> None:
        self.name, self.parts, self.parameter = name, parts, parameter
        self.writes = writes  # of all processes that hold these regions, the one that speaks for them
        self.partial = partial  # its gradient is yet to be summed over tp
        self.data = local(parameter)
        for region, rows in parts:
            assert self.data[rows].shape == region.dims, f"{name}: {tuple(self.data[rows].shape)} is not {region}"
        assert sum(region.dims[0] for region, _ in parts) == len(self.data), f"{name}: {len(self.data)} rows, {parts}"

    @property
    def region(self) -> Region:
        """Of a weight that is no stack of experts."""
        [(region, _)] = self.parts
        return region

    @property
    def grad(self) -> Tensor:
        assert self.parameter.grad is not None, f"{self.name} has no gradient"
        return local(self.parameter.grad)


class Woven:
    """What `weave` makes: this process's model, where its weights lie in the whole, and how to run it."""

    def __init__(self, shape: Shape, layout: Layout, mesh: Mesh, model: Decoder) -> None:
        self.shape, self.layout, self.mesh, self.model = shape, layout, mesh, model
        sizes = parameter_sizes(shape)
        self.weights = [self._weight(name, parameter, sizes) for name, parameter in model.named_parameters()]
        self.replicas = [] if layout.sharded else replicate(model, layout, mesh)

    # -- weights ------------------------------------------------------------------------------------------------------

    def fill(self, source: Callable[[Region], Tensor]) -> None:
        """Give every weight its value: `source` is asked for each region this process holds."""
        with torch.no_grad():
            for weight in self.weights:
                for region, rows in weight.parts:
                    weight.data[rows].copy_(source(region))

    def pieces(self) -> list[Piece]:
        return [
            Piece(region, weight.data[rows], weight.writes) for weight in self.weights for region, rows in weight.parts
        ]

    # -- passes -------------------------------------------------------------------------------------------------------

    def train_pass(self, rows: Rows, scale: Tensor | float) -> Tensor:
        """Forward and backward over this process's rows. The gradient is that of `scale` · summed loss.

        Returns:
            The summed loss of these rows, on the last stage; 0 elsewhere. Still to be added up over replicas.
        """
        self._clear_gradients()
        micro_batches = self._part(rows).split(self.micro_batch(rows))
        ops = stage_ops(self.layout.schedule, self.mesh.index("pp"), self.layout.pp, len(micro_batches))
        losses = self._run(ops, micro_batches, scale)
        self._finish_gradients()
        return losses / scale

    @torch.no_grad()
    def eval_pass(self, rows: Rows, micro_batch: int | None = None) -> Tensor:
        """Summed loss of these rows, on the last stage; 0 elsewhere. Passes are as large as in training by default."""
        micro_batches = self._part(rows).split(micro_batch or self.micro_batch(rows))
        ops = [Op("F", index) for index in range(len(micro_batches))]
        losses = self._run(ops, micro_batches, 1.0)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass nobody else would
        return losses

    def micro_batch(self, rows: Rows) -> int:
        return self.layout.micro_batch_size(len(rows.tokens) * self.layout.replicas)

    def _part(self, rows: Rows) -> Rows:
        return rows.part(self.layout.cp, self.mesh.index("cp"))

    def _run(self, ops: list[Op], micro_batches: list[Rows], scale: Tensor | float) -> Tensor:
        size, seq = micro_batches[0].tokens.shape
        dims = (size, seq // self.layout.tp if self.layout.sp else seq, self.shape.hidden)
        pipeline = Pipeline(self.mesh, dims, DTYPES[self.layout.precision])
        vocab_start = even_split(self.shape.vocab, self.layout.tp, self.mesh.index("tp"))[0]
        vocab_group = self.mesh.group("tp") if self.layout.tp > 1 else None
        counting = torch.arange(seq, device=self.mesh.device)

        def forward(index: int, hidden: Tensor | None) -> Tensor:
            rows = micro_batches[index]
            x = rows.tokens if hidden is None else hidden
            positions = rows.positions if rows.positions is not None else counting
            targets = rows.targets if self.layout.loss == "chunked" and self.mesh.last_stage else None
            y = self.model(x, positions, rows.documents, targets=targets)
            if not self.mesh.last_stage:
                return y
            if targets is not None:  # the head has made the loss
                return y * scale
            return cross_entropy_sum(y, rows.targets, vocab_start, vocab_group) * scale

        losses = pipeline.run(ops, forward, self._before_backward)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.mesh.device)

    def _before_backward(self, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            prepare_backward(self.model, self.layout, last)
        for replicas in self.replicas:
            replicas.last_pass = last

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for replicas in self.replicas:
            replicas.clear()

    def _finish_gradients(self) -> None:
        """Sum what backward left as shares: over replicas, over tp, and between the two ends of a tied embedding."""
        for replicas in self.replicas:
            replicas.finish()
        if self.layout.tp > 1:
            sum_over([weight.grad for weight in self.weights if weight.partial], self.mesh.group("tp"))
        if self.shape.tied and self.mesh.ends is not None:
            sum_over([weight.grad for weight in self.weights if weight.name == "embed.weight"], self.mesh.ends)

    # -- places -------------------------------------------------------------------------------------------------------

    def _weight(self, name: str, parameter: nn.Parameter, sizes: dict[str, tuple[int, ...]]) -> Weight:
        """Where a parameter of this process lies in the whole: its tp share, and of that its fsdp share."""
        mesh, tied_copy = self.mesh, name == "head.weight" and self.shape.tied
        whole, dim = "embed.weight" if tied_copy else name, cut_dim(name)
        if is_stacked(name):
            experts, ffn = held_experts(self.shape, self.layout, mesh)
            rows = self._rows(
                parameter, len(experts) * len(ffn), self.layout.expert_ways[1], mesh.index("expert_shard")
            )
            parts = stacked_parts(self.shape, name, experts, ffn, rows)
            return Weight(name, parts, parameter, mesh.index("expert_replicate") == 0, partial=False)
        region = Region.whole(whole, sizes[whole])
        if dim is not None:
            region = region.narrow(dim, *even_split(region.sizes[dim], self.layout.tp, mesh.index("tp")))
        rows = self._rows(parameter, region.dims[0], self.layout.weight_ways[1], mesh.index("shard"))
        parts = [(region.narrow(0, rows.start, rows.stop), slice(0, len(rows)))]
        writes = not tied_copy and mesh.index("replicate") == 0 and (dim is not None or mesh.index("tp") == 0)
        return Weight(whole, parts, parameter, writes, self.layout.tp > 1 and partial_gradient(name, self.layout.sp))

    def _rows(self, parameter: nn.Parameter, rows: int, ways: int, index: int) -> range:
        """Of a parameter's rows, those that FSDP2 has left to this process."""
        return range(*_fsdp_rows(rows, ways, index)) if isinstance(parameter, DTensor) else range(rows)


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor; a plain one as it is."""
    return x._local_tensor if isinstance(x, DTensor) else x.detach()


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Add tensors up over a group, in place, in one message."""
    if not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat, group=group)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(total.view_as(x))


def _fsdp_rows(rows: int, ways: int, index: int) -> tuple[int, int]:
    """FSDP2's own split of dim 0: equal chunks rounded up, what is left for the last ones."""
    chunk = -(-rows // ways)
    return min(index * chunk, rows), min((index + 1) * chunk, rows)
