"""Data parallelism: replicas add up their gradients, bucket by bucket, while backward still runs (Li et al., 2020)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.config.layout import Layout
from weft.models.moe import Experts
from weft.parallel.lowered import Lowered
from weft.parallel.mesh import Mesh

BUCKET_BYTES = 32 * 2**20
"""Of a bucket, if nothing else is said."""


def replicate(model: nn.Module, lowered: Lowered | None, layout: Layout, mesh: Mesh, bucket: int) -> list[Replicas]:
    """In buckets of so many bytes. Those who hold the same experts are not those who hold the same of the rest."""
    experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    own = {id(p) for p in experts}
    rest = [p for p in model.parameters() if id(p) not in own]
    kinds = ((rest, layout.weight_ways, "replicate"), (experts, layout.expert_ways, "expert_replicate"))
    return [
        Replicas({p: lowered.weight_of[p] if lowered else p for p in members}, mesh.group(axis), bucket)
        for members, (copies, _), axis in kinds
        if members and copies > 1
    ]


class Replicas:
    """Gradients live in flat buckets: what backward adds up there goes over the network as it lies, with no copy.

    Args:
        weights: a parameter of the model, which tells that it has a gradient → the weight that has it then: the same one,
            unless the model is lowered.
    """

    def __init__(self, weights: dict[nn.Parameter, nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int) -> None:
        self.group = group
        self.last_pass = True
        self.buckets: list[Tensor] = []
        self.waiting: list[int] = []  # parameters of each bucket that backward has yet to reach
        self.sizes: list[int] = []
        self.works: list[dist.Work] = []
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        for members in _buckets(list(weights.items()), bucket_bytes):
            index, sizes = len(self.buckets), [weight.numel() for _, weight in members]
            first = members[0][1]
            bucket = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            for (telling, weight), part in zip(members, bucket.split(sizes), strict=True):
                self.views.append((weight, part.view_as(weight)))
                telling.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived(index))
            self.buckets.append(bucket)
            self.sizes.append(len(members))
        self.clear()

    def clear(self) -> None:
        """Zero every gradient: the start of a step."""
        for bucket in self.buckets:
            bucket.zero_()
        for parameter, view in self.views:
            parameter.grad = view
        self.waiting = list(self.sizes)

    def send(self) -> None:
        """Every gradient of the step is there: send what backward did not."""
        for index in range(len(self.buckets)):
            if self.waiting[index]:
                self.waiting[index] = 0
                self._send(index)

    def finish(self) -> None:
        """Wait for the sums that are still on their way."""
        for work in self.works:
            work.wait()
        self.works.clear()
        assert not any(self.waiting), "backward did not reach every parameter"

    def _arrived(self, index: int) -> None:
        if not self.last_pass:
            return
        self.waiting[index] -= 1
        if not self.waiting[index]:
            self._send(index)

    def _send(self, index: int) -> None:
        self.works.append(dist.all_reduce(self.buckets[index], group=self.group, async_op=True))


def _buckets(
    weights: list[tuple[nn.Parameter, nn.Parameter]], most: int
) -> list[list[tuple[nn.Parameter, nn.Parameter]]]:
    """Weights in the order in which backward reaches them, about: the last first."""
    buckets: list[list[tuple[nn.Parameter, nn.Parameter]]] = [[]]
    for telling, weight in reversed(weights):
        if buckets[-1] and sum(other.nbytes for _, other in buckets[-1]) + weight.nbytes > most:
            buckets.append([])
        buckets[-1].append((telling, weight))
    return buckets
