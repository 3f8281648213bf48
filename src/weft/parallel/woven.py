"""Woven: one process's part of a distributed model, and its passes over the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.checkpoint.region import Piece, Region
from weft.checkpoint.stacked import Part, stacked_parts
from weft.config.layout import Layout
from weft.models.cuts import cut_dim, even_split, partial_gradient
from weft.models.dtypes import DTYPES
from weft.models.moe import Router
from weft.models.parameters import buffer_sizes, is_stacked, parameter_sizes
from weft.models.shape import Shape
from weft.parallel.chunk import Chunk
from weft.parallel.experts import held_experts
from weft.parallel.headtail import own_tokens
from weft.parallel.loss import cross_entropy_sum
from weft.parallel.mesh import Mesh
from weft.parallel.pipeline import Pipeline
from weft.schedules.orders import forward_only
from weft.schedules.table import Schedule


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
    """What `weave` makes: this process's chunks of the model, where their weights lie in the whole, and how to run them.

    Args:
        chunks: stage → what this process has of it.
    """

    def __init__(self, shape: Shape, layout: Layout, mesh: Mesh, chunks: dict[int, Chunk]) -> None:
        self.shape, self.layout, self.mesh, self.chunks = shape, layout, mesh, chunks
        sizes = parameter_sizes(shape)
        self.weights = [
            self._weight(name, parameter, sizes)
            for chunk in chunks.values()
            for name, parameter in chunk.parameters.items()
        ]
        kept = buffer_sizes(shape)
        self.buffers = {
            name: buffer for chunk in chunks.values() for name, buffer in chunk.model.named_buffers() if name in kept
        }
        """What has no gradient, by name: whole on every process, and everywhere the same."""

    def modules(self) -> dict[str, nn.Module]:
        """Every module that this process holds, by its name in the whole model; not the models themselves."""
        return {name: part for chunk in self.chunks.values() for name, part in chunk.model.named_modules() if name}

    # -- weights ------------------------------------------------------------------------------------------------------

    def fill(self, source: Callable[[Region], Tensor]) -> None:
        """Give every weight its value: `source` is asked for each region this process holds."""
        with torch.no_grad():
            for weight in self.weights:
                for region, rows in weight.parts:
                    weight.data[rows].copy_(source(region))
            for name, buffer in self.buffers.items():
                buffer.copy_(source(Region.whole(name, tuple(buffer.shape))))

    def pieces(self) -> list[Piece]:
        writes = all(self.mesh.index(axis) == 0 for axis in ("replicate", "shard", "tp"))
        return [
            Piece(region, weight.data[rows], weight.writes) for weight in self.weights for region, rows in weight.parts
        ] + [Piece(Region.whole(name, tuple(kept.shape)), kept, writes) for name, kept in self.buffers.items()]

    # -- passes -------------------------------------------------------------------------------------------------------

    def train_pass(self, rows: Rows, scale: Tensor | float, balance_scale: Tensor | float = 1.0) -> Tensor:
        """Forward and backward over this process's rows. The gradient is that of `scale` · summed loss, and of
        `balance_scale` · the losses of experts' balance.

        Returns:
            The summed loss of these rows, on the last stage; 0 elsewhere. Still to be added up over replicas.
        """
        for chunk in self.chunks.values():
            chunk.clear()
        for module in self.modules().values():
            if isinstance(module, Router) and module.balance is not None:
                module.balance.begin(len(rows.tokens) * self.layout.replicas, balance_scale)
        micro_batches = self._part(rows).split(self.micro_batch(rows))
        losses = self._run(self.layout.table(len(micro_batches)), micro_batches, scale)
        self._finish_gradients()
        return losses / scale

    @torch.no_grad()
    def eval_pass(self, rows: Rows, micro_batch: int | None = None) -> Tensor:
        """Summed loss of these rows, on the last stage; 0 elsewhere. Passes are as large as in training by default."""
        micro_batches = self._part(rows).split(micro_batch or self.micro_batch(rows))
        losses = self._run(forward_only(self.layout.place, len(micro_batches)), micro_batches, 1.0)
        for chunk in self.chunks.values():
            chunk.rest()
        return losses

    def micro_batch(self, rows: Rows) -> int:
        return self.layout.micro_batch_size(len(rows.tokens) * self.layout.replicas)

    def _part(self, rows: Rows) -> Rows:
        return rows.part(self.layout.cp, self.mesh.index("cp"))

    def _run(self, table: Schedule, micro_batches: list[Rows], scale: Tensor | float) -> Tensor:
        size, seq = micro_batches[0].tokens.shape
        dims = (size, seq // self.layout.tp if self.layout.sp else seq, self.shape.hidden)
        pipeline = Pipeline(self.mesh, dims, DTYPES[self.layout.compute], table)
        for chunk in self.chunks.values():
            chunk.refresh()
        losses = pipeline.run(Passes(self, micro_batches, scale))
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.mesh.device)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _finish_gradients(self) -> None:
        """Sum what backward left as shares: over replicas, over tp, and between the two ends of a tied embedding."""
        for chunk in self.chunks.values():
            chunk.finish()
        if self.layout.tp > 1:
            partial = [weight.grad for weight in self.weights if weight.partial]
            sum_over(partial, self.mesh.group("tp"), self.mesh.device)
        if self.shape.tied and self.layout.pp > 1:
            tied = [weight.grad for weight in self.weights if weight.name == "embed.weight"]
            if len(tied) > 1:  # both on this process, in two chunks
                for grad in tied[1:]:
                    tied[0].add_(grad)
                    grad.copy_(tied[0])
            elif self.mesh.ends is not None:
                sum_over(tied, self.mesh.ends, self.mesh.device)

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


class Passes:
    """What the pipeline's operations do with the micro-batches of one step."""

    def __init__(self, woven: Woven, micro_batches: list[Rows], scale: Tensor | float) -> None:
        self.chunks, self.micro_batches, self.scale = woven.chunks, micro_batches, scale
        layout, mesh, vocab = woven.layout, woven.mesh, woven.shape.vocab
        self.last_stage, self.chunked = layout.num_stages - 1, layout.loss == "chunked"
        self.vocab_start = even_split(vocab, layout.tp, mesh.index("tp"))[0]
        self.vocab_group = mesh.group("tp") if layout.tp > 1 else None
        self.counting = torch.arange(micro_batches[0].tokens.shape[1], device=mesh.device)

    def forward(self, stage: int, micro_batch: int, x: Tensor | None) -> Tensor:
        rows = self.micro_batches[micro_batch]
        positions = rows.positions if rows.positions is not None else self.counting
        x = rows.tokens if x is None else x
        targets = rows.targets if self.chunked and stage == self.last_stage else None
        y = self.chunks[stage].model(x, positions, rows.documents, targets=targets)
        if stage < self.last_stage:
            return y
        if targets is not None:  # the head has made the loss
            return y * self.scale
        return cross_entropy_sum(y, rows.targets, self.vocab_start, self.vocab_group) * self.scale

    def backward(self, stage: int, micro_batch: int, y: Tensor, grad: Tensor | None, put_off: bool, last: bool) -> None:
        self.chunks[stage].backward(micro_batch, y, grad, put_off, last)

    def weights(self, stage: int, micro_batch: int, last: bool) -> None:
        self.chunks[stage].weights(micro_batch, last)


def local(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor; a plain one as it is."""
    return x._local_tensor if isinstance(x, DTensor) else x.detach()


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Add tensors up over a group, in place, in one message; from wherever they lie, by the way of the device."""
    if not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors]).to(device)
    dist.all_reduce(flat, group=group)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(total.view_as(x))


def _fsdp_rows(rows: int, ways: int, index: int) -> tuple[int, int]:
    """FSDP2's own split of dim 0: equal chunks rounded up, what is left for the last ones."""
    chunk = -(-rows // ways)
    return min(index * chunk, rows), min((index + 1) * chunk, rows)
