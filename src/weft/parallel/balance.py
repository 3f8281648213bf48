"""Balance of experts over all processes: what each router sees of a step, and what moves its bias after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from weft.config.tree import BalanceConfig
from weft.models.balance import Balance
from weft.models.moe import MoE
from weft.parallel.collectives import all_gather_rows, all_reduce
from weft.parallel.mesh import Mesh
from weft.parallel.woven import Woven


@dataclass(frozen=True)
class Routing:
    """Where the routers sent the tokens of a step. The same on every process.

    Attributes:
        load: pairs of a token and an expert, of each block that has experts, [blocks, X].
        dropped: of them, those that found their expert full, [blocks].
        loss: of balance, with its weights.
    """

    load: Tensor
    dropped: Tensor
    loss: float

    @property
    def imbalance(self) -> float:
        """What the busiest expert of any block has, in even shares."""
        return float((self.load / self.load.mean(dim=1, keepdim=True)).max())

    @property
    def entropy(self) -> float:
        """Of the load, mean over blocks: 1 where it is even, 0 where one expert has all."""
        shares = self.load / self.load.sum(dim=1, keepdim=True)
        return float(torch.special.entr(shares).sum(dim=1).mean()) / math.log(max(self.load.shape[1], 2))

    @property
    def dropped_share(self) -> float:
        return float(self.dropped.sum() / self.load.sum())


class Parts:
    """A sequence of which each process of cp and tp routes a part."""

    def __init__(self, mesh: Mesh) -> None:
        self.groups = [mesh.group(axis) for axis in ("cp", "tp") if mesh.size(axis) > 1]
        self.ways = math.prod(group.size() for group in self.groups)

    def total(self, counts: Tensor) -> Tensor:
        for group in self.groups:
            counts = all_reduce(counts, group)
        return counts

    def before(self, counts: Tensor) -> Tensor:
        """Over tp alone; parts of cp do not lie one after the other, and Config refuses them."""
        for group in self.groups:
            parts = all_gather_rows(counts, group).unflatten(0, (group.size(), -1))
            return parts[: group.rank()].sum(dim=0)
        return torch.zeros_like(counts)


def balance_experts(woven: Woven, settings: BalanceConfig) -> None:
    """Give every router of this process its Balance."""
    for layer in layers(woven).values():
        layer.router.balance = Balance(
            layer.router.experts,
            woven.mesh.device,
            sequence=settings.sequence,
            z=settings.z,
            capacity=settings.capacity,
            spread=Parts(woven.mesh),
        )
        layer.experts.drops = settings.capacity > 0


def layers(woven: Woven) -> dict[int, MoE]:
    """Block → its experts, of those on this process."""
    return {int(name.split(".")[1]): part for name, part in woven.modules().items() if isinstance(part, MoE)}


def routing_of(woven: Woven) -> Routing | None:
    """What all routers saw of the step; every process calls this. None: the model has none."""
    shape = woven.shape
    if shape.experts is None:
        return None
    count = shape.experts.num_experts
    blocks = [block for block in range(shape.num_layers) if shape.has_experts(block)]
    table = torch.zeros(len(blocks), count + 2, dtype=torch.float64, device=woven.mesh.device)
    for block, layer in layers(woven).items():
        if (balance := layer.router.balance) is not None:
            row = table[blocks.index(block)]
            row[:count], row[count], row[count + 1] = balance.load, balance.dropped, balance.loss
    dist.all_reduce(table)
    load, dropped, losses = table.cpu().split((count, 1, 1), dim=1)
    return Routing(load, dropped.squeeze(1), float(losses.sum()))


def move_biases(woven: Woven, routing: Routing, speed: float) -> None:
    """Where the load of a step was above the mean, the bias falls by `speed`; where below, it rises."""
    blocks = [block for block in range(woven.shape.num_layers) if woven.shape.has_experts(block)]
    for block, layer in layers(woven).items():
        if layer.router.bias is not None:
            load = routing.load[blocks.index(block)]
            layer.router.bias += speed * (load.mean() - load).sign().to(layer.router.bias)
