"""AdamW over what this process holds of the weights (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.checkpoint.region import Piece, Region
from weft.config.tree import OptimizerConfig
from weft.parallel.woven import Weight

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """torch's fused AdamW on plain local tensors: however a weight is sharded, the update is elementwise.

    Matrices decay; norms and biases do not. The moments exist from the start, so memory is known before the first step.
    """

    def __init__(self, weights: Sequence[Weight], config: OptimizerConfig) -> None:
        self.weights = weights
        # the same memory as the weight, without the wrapping of whoever sharded it
        self.tensors = [torch.nn.Parameter(weight.data) for weight in weights]
        decayed = [len(weight.region.sizes) > 1 for weight in weights]
        groups = [
            {"params": [x for x, yes in zip(self.tensors, decayed, strict=True) if yes == group], "weight_decay": rate}
            for group, rate in ((True, config.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for x in self.tensors:
            step = torch.zeros((), dtype=torch.float32, device=x.device)
            self.adamw.state[x] = {"step": step} | {moment: torch.zeros_like(x) for moment in MOMENTS}

    def step(self, lr: float) -> None:
        """One update from the gradients that lie in the weights."""
        for x, weight in zip(self.tensors, self.weights, strict=True):
            x.grad = weight.grad
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for x in self.tensors:
            x.grad = None

    @property
    def updates(self) -> int:
        """Updates made so far: Adam's t."""
        return int(self.adamw.state[self.tensors[0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for x in self.tensors:
            self.adamw.state[x]["step"].fill_(count)

    def pieces(self) -> list[Piece]:
        """Both moments of every weight, as tensors named `exp_avg.<weight>` and `exp_avg_sq.<weight>`."""
        return [
            Piece(_renamed(weight.region, moment), self.adamw.state[x][moment], weight.writes)
            for x, weight in zip(self.tensors, self.weights, strict=True)
            for moment in MOMENTS
        ]


def _renamed(region: Region, moment: str) -> Region:
    return Region(f"{moment}.{region.name}", region.sizes, region.start, region.stop)
