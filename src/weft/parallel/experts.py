"""Expert parallelism: experts are dealt out over processes, and tokens travel to theirs (Lepikhin et al., GShard, 2020).

Two axes cut the experts, whatever the rest of the model is cut by: ep deals them out whole, etp cuts each one's matrices.
Every process starts with tokens of its own: other sequences, another part of the sequence, or, where tp processes have
the same ones, a part of them. The tokens of the etp processes are gathered, then each row goes to the ep process that
has its expert, through the expert, and back; the sums are scattered over etp. How many rows go where is known only when
the router has spoken: one small message tells, and none, for one process or for all, is a number like any other.

Shared experts work while tokens travel: all but their last matrix on the way there, that one on the way back; their
gradients, on the ways of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.config.layout import Layout
from weft.models.cuts import even_split
from weft.models.mlp import SwigluMLP
from weft.models.moe import Combine, Dispatch, Experts, MoE, Order
from weft.models.shape import Shape
from weft.parallel.collectives import (
    AllToAll,
    GatherRows,
    JoinSequence,
    ScatterRows,
    TakeSequence,
    all_gather_rows,
    all_to_all,
)
from weft.parallel.flight import travel
from weft.parallel.mesh import Mesh
from weft.parallel.tensor import Axis


def deal_experts(model: nn.Module, shape: Shape, layout: Layout, mesh: Mesh) -> None:
    """Leave to this process its share of the experts, and let tokens travel. Model on meta, or with memory for all."""
    assert shape.experts is not None
    experts, ffn = held_experts(shape, layout, mesh)
    for module in model.modules():
        if isinstance(module, Experts) and layout.ep * layout.expert_tp > 1:
            module.__class__ = DealtExperts
            assert isinstance(module, DealtExperts)
            module.ep, module.etp = mesh.group("ep"), mesh.group("etp")
            module.num_experts, module.ffn = shape.experts.num_experts, len(ffn)
            for name, parameter in list(module.named_parameters()):
                share = torch.empty_like(parameter[: len(experts) * len(ffn)])
                module.register_parameter(name, nn.Parameter(share))
        if isinstance(module, MoE):
            module.__class__ = DealtMoE
            assert isinstance(module, DealtMoE)
            module.axis = Axis(mesh.group("tp"), layout.sp) if layout.tp > 1 else None
            module.overlaps = module.shared is not None and layout.ep > 1


def held_experts(shape: Shape, layout: Layout, mesh: Mesh) -> tuple[range, range]:
    """The experts of this process, and which of each one's F hidden numbers it works out."""
    assert shape.experts is not None
    experts = even_split(shape.experts.num_experts, layout.ep, mesh.index("ep"))
    return range(*experts), range(*even_split(shape.experts.ffn, layout.expert_tp, mesh.index("etp")))


class DealtExperts(Experts):
    """A share of the experts, or of each one's matrices."""

    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    num_experts: int  # of all processes

    def forward(self, tokens: Tensor, numbers: Tensor, weights: Tensor, beside: Beside | None = None) -> Tensor:
        if self.etp.size() > 1:
            tokens, weights = GatherRows.apply(tokens, self.etp), GatherRows.apply(weights, self.etp)
            numbers = all_gather_rows(numbers, self.etp)
        order = Order(numbers, self.num_experts, self.drops)
        x, scale = Dispatch.apply(tokens, order), weights.flatten()[order.pairs].to(tokens.dtype)
        journey = Journey.plan(order.counts, self.ep)
        x, scale = journey.there(x, scale, meanwhile=beside.begin if beside else None)
        y = journey.back(self.compute(x, scale, journey.counts), meanwhile=beside.finish if beside else None)
        y = Combine.apply(y, order)
        return ScatterRows.apply(y, self.etp) if self.etp.size() > 1 else y


class DealtMoE(MoE):
    """Routes the tokens of this process. Under tp without sp every process of the axis has the same: each routes its part.

    Attributes:
        axis: None without tp.
        overlaps: whether there are shared experts, and journeys that they can work beside.
    """

    axis: Axis | None
    overlaps: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.overlaps:
            return super().forward(x)
        assert self.shared is not None
        beside = Beside(self.shared, self.axis, x)
        routed = self.routed(x, beside)
        assert beside.y is not None
        return beside.y + routed

    def routed(self, x: Tensor, *beside: Beside) -> Tensor:
        if self.axis is None or self.axis.sp:
            return super().routed(x, *beside)
        group = self.axis.group
        return JoinSequence.apply(super().routed(TakeSequence.apply(x, group), *beside), group)


class Beside:
    """The shared experts' pass, in two halves. No dataclass: of those FSDP2 hands a copy on.

    Attributes:
        y: what they give, when both are done.
    """

    def __init__(self, shared: SwigluMLP, axis: Axis | None, x: Tensor) -> None:
        self.shared, self.axis, self.x = shared, axis, x
        self.hidden: Tensor | None = None
        self.y: Tensor | None = None

    def begin(self) -> None:
        self.hidden = self.shared.inner(self.x if self.axis is None else self.axis.enter(self.x))

    def finish(self) -> None:
        self.y = self.shared.down(self.hidden)
        self.hidden = None


@dataclass(frozen=True)
class Journey:
    """The way of rows that are sorted by expert to the processes that have theirs, and back.

    Attributes:
        sent, received: rows for and from each process.
        places: of the rows as they came, by process and then by expert, those of the first expert first; `home` undoes it.
        counts: rows of each expert that is held here.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    places: Tensor
    home: Tensor
    counts: Tensor

    @classmethod
    def plan(cls, counts: Tensor, group: dist.ProcessGroup) -> Journey:
        """From this process's rows for each expert of all processes, [X]."""
        mine = counts.view(group.size(), -1)
        theirs = all_to_all(mine, group)  # [process, expert here]
        sent, received = torch.stack((mine.sum(dim=1), theirs.sum(dim=1))).tolist()
        experts = torch.arange(theirs.numel(), device=counts.device) % theirs.shape[1]
        places = experts.repeat_interleave(theirs.flatten(), output_size=sum(received)).argsort(stable=True)
        return cls(group, sent, received, places, places.argsort(), theirs.sum(dim=0))

    def there(self, *rows: Tensor, meanwhile: Callable[[], None] | None = None) -> list[Tensor]:
        """Rows by expert of all processes → rows by expert held here."""
        arrived = self._travel(rows, self.sent, self.received, meanwhile)
        return [_Reorder.apply(x, self.places, self.home) for x in arrived]

    def back(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        rows = (_Reorder.apply(x, self.home, self.places),)
        return self._travel(rows, self.received, self.sent, meanwhile)[0]

    def _travel(
        self, rows: tuple[Tensor, ...], sent: list[int], received: list[int], meanwhile: Callable[[], None] | None
    ) -> list[Tensor]:
        if meanwhile is not None:
            return travel(rows, sent, received, self.group, meanwhile)
        return [AllToAll.apply(x, sent, received, self.group) for x in rows]


class _Reorder(torch.autograd.Function):
    """x[places], where `home` is the way back: no rows are added up, so backward need not look for any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, home: Tensor) -> Tensor:
        ctx.home = home
        return x[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.home], None, None
