"""What plain AdamW, in one process, makes of the gradients that a layout found: the measure of its updates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weft.config.tree import OptimizerConfig
from weft.train.step import clip_factor
from weft.verify.trace import Trace


def replayed_weights(config: OptimizerConfig, trace: Trace, name: str) -> Iterator[Tensor]:
    """The weight `name` after each step of a trace, worked out again from its initial value and its gradients.

    Adam's formula is written out here (Loshchilov and Hutter, 2019, algorithm 2), in fp64: it shares nothing with the
    optimizer it checks.
    """
    weight = trace.read(0, f"weight.{name}").double()
    decay = config.weight_decay if weight.dim() > 1 else 0.0
    beta1, beta2 = config.betas
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, step in enumerate(trace.steps, start=1):
        grad = trace.read(t, f"grad.{name}").double() * clip_factor(step.grad_norm, config.clip_norm)
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        direction = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + config.eps)
        weight = weight * (1 - step.lr * decay) - step.lr * direction
        yield weight
