"""Expert parallelism: experts are dealt out over processes, and tokens travel to theirs (Lepikhin et al., GShard, 2020).

Two axes cut the experts, whatever the rest of the model is cut by: ep deals them out whole, etp cuts each one's matrices.
Every process starts with tokens of its own: other sequences, another part of the sequence, or, where tp processes have
the same ones, a part of them. The tokens of the etp processes are gathered, then each row goes to the ep process that
has its expert, through the expert, and back; the sums are scattered over etp. How many rows go where is known only when
the router has spoken: one small message tells, and none, for one process or for all, is a number like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.config.layout import Layout
from weft.models.cuts import even_split
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
from weft.parallel.mesh import Mesh


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
        if isinstance(module, MoE) and layout.tp > 1 and not layout.sp:
            module.__class__ = PartMoE
            assert isinstance(module, PartMoE)
            module.tp = mesh.group("tp")


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

    def forward(self, tokens: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        if self.etp.size() > 1:
            tokens, weights = GatherRows.apply(tokens, self.etp), GatherRows.apply(weights, self.etp)
            numbers = all_gather_rows(numbers, self.etp)
        order = Order(numbers, self.num_experts, self.drops)
        x, scale = Dispatch.apply(tokens, order), weights.flatten()[order.pairs].to(tokens.dtype)
        journey = Journey.plan(order.counts, self.ep)
        y = self.compute(journey.there(x), journey.there(scale), journey.counts)
        y = Combine.apply(journey.back(y), order)
        return ScatterRows.apply(y, self.etp) if self.etp.size() > 1 else y


class PartMoE(MoE):
    """Under tp without sp every process of the axis has the same tokens: each routes its part of them."""

    tp: dist.ProcessGroup

    def routed(self, x: Tensor) -> Tensor:
        return JoinSequence.apply(super().routed(TakeSequence.apply(x, self.tp)), self.tp)


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

    def there(self, x: Tensor) -> Tensor:
        """Rows by expert of all processes → rows by expert held here."""
        return _Reorder.apply(AllToAll.apply(x, self.sent, self.received, self.group), self.places, self.home)

    def back(self, x: Tensor) -> Tensor:
        return AllToAll.apply(_Reorder.apply(x, self.home, self.places), self.received, self.sent, self.group)


class _Reorder(torch.autograd.Function):
    """x[places], where `home` is the way back: no rows are added up, so backward need not look for any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, home: Tensor) -> Tensor:
        ctx.home = home
        return x[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.home], None, None
