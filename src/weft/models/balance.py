"""Balance: what keeps a router from sending all tokens to a few experts, and the record of where it sent them.

Three ways, to be used alone or together. A bias that is added where experts are chosen falls for a busy expert and rises
for an idle one, step by step (Wang et al., Auxiliary-Loss-Free Load Balancing, 2024); it is moved in parallel/balance.py.
A loss, small beside the model's own, grows where the tokens of a sequence crowd (DeepSeek-V3 Technical Report, 2024,
2.1.2), and another where logits grow large (Zoph et al., ST-MoE, 2022, 3.1). And an expert may have room for so many
tokens of a sequence only: the later ones go without it (Lepikhin et al., GShard, 2020, 2.2).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.models.shape import Experts


class Spread(Protocol):
    """How a sequence lies over processes, of which each routes a part. Counts are [B, X]."""

    ways: int

    def total(self, counts: Tensor) -> Tensor:
        """Those of whole sequences."""

    def before(self, counts: Tensor) -> Tensor:
        """Those of the parts before this process's."""


class Whole:
    """The sequence is here."""

    ways = 1

    def total(self, counts: Tensor) -> Tensor:
        return counts

    def before(self, counts: Tensor) -> Tensor:
        return torch.zeros_like(counts)


class Balance:
    """One router's, in training.

    Args:
        sequence, z: weights of the two losses.
        capacity: of an expert, in even shares of a sequence's tokens; 0: no end.

    Attributes:
        load: this process's pairs of a token and an expert in this step, by expert, [X]; dropped ones too.
        dropped: how many of them were.
        loss: this process's share of both losses of this step.
    """

    def __init__(
        self,
        experts: Experts,
        device: torch.device,
        *,
        sequence: float = 0.0,
        z: float = 0.0,
        capacity: float = 0.0,
        spread: Spread | None = None,
    ) -> None:
        self.experts, self.device, self.spread = experts, device, spread or Whole()
        self.sequence, self.z, self.capacity = sequence, z, capacity
        self.begin(1, 1.0)

    def begin(self, sequences: int, scale: Tensor | float) -> None:
        """A step over so many sequences, on all processes; gradients of the losses come times `scale`."""
        self.sequences, self.scale = sequences, scale
        self.load = torch.zeros(self.experts.num_experts, dtype=torch.int64, device=self.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)

    def observe(self, numbers: Tensor, weights: Tensor, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Take down where tokens go, and have the losses' gradients come with that of `weights`.

        Args:
            numbers, weights: of each token's experts, [B, T, k].
            logits, scores: of all experts, [B, T, X].

        Returns:
            numbers, where one that was dropped is X; and the weights.
        """
        again = torch._C._current_graph_task_id() != -1  # in a backward pass: this forward pass is recomputed
        here = torch.zeros(len(numbers), scores.shape[-1], dtype=torch.int64, device=numbers.device)
        here.scatter_add_(1, numbers.flatten(1), torch.ones_like(numbers).flatten(1))
        if self.sequence or self.z:
            loss = self.losses(here, logits, scores)
            weights = _WithLoss.apply(weights, loss, self.scale)
            self.loss += 0 if again else loss.detach()
        self.load += 0 if again else here.sum(dim=0)
        if self.capacity:
            numbers = self.with_room(numbers, here)
            self.dropped += 0 if again else (numbers == self.experts.num_experts).sum()
        return numbers, weights

    def losses(self, here: Tensor, logits: Tensor, scores: Tensor) -> Tensor:
        """This process's share of the means over all sequences, and all tokens.

        A sequence's loss is the sum over experts of the tokens that chose it, over an even share of them, times the mean
        of its scores. Counts are of whole sequences; scores, of which it is linear, need not be.
        """
        seq = logits.shape[1] * self.spread.ways
        even = self.experts.per_token * seq / self.experts.num_experts
        crowded = self.spread.total(here) / even
        shares = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=1) / seq
        uneven = (crowded * shares).sum() / self.sequences
        large = logits.logsumexp(dim=-1).square().sum() / (self.sequences * seq)
        return self.sequence * uneven + self.z * large

    def with_room(self, numbers: Tensor, here: Tensor) -> Tensor:
        """The same numbers [B, T, k]; X where earlier tokens of the sequence have filled the expert."""
        experts, seq = numbers.flatten(1), numbers.shape[1] * self.spread.ways
        room = math.ceil(self.capacity * self.experts.per_token * seq / self.experts.num_experts)
        order = experts.argsort(dim=1, stable=True)
        first = here.cumsum(dim=1) - here  # where each expert's tokens begin in this order
        places = torch.arange(order.shape[1], device=order.device) - first.gather(1, experts.gather(1, order))
        rank = torch.empty_like(experts).scatter_(1, order, places) + self.spread.before(here).gather(1, experts)
        return experts.masked_fill(rank >= room, self.experts.num_experts).view_as(numbers)


class _WithLoss(torch.autograd.Function):
    """x as it is; where its gradient comes, that of a loss comes along."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.loss_grad = torch.ones_like(loss) * scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.loss_grad, None
