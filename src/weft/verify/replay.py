"""What plain AdamW or Muon, in one process, makes of the gradients that a layout found: the measure of its updates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weft.config.tree import OptimizerConfig
from weft.train.step import clip_factor
from weft.verify.trace import Trace


def replayed_weights(config: OptimizerConfig, trace: Trace, name: str) -> Iterator[tuple[Tensor, float]]:
    """The weight `name` after each step of a trace, worked out again from its initial value and its gradients; and how far
    rounding alone may have moved a number of it in that step, where it was Muon on a GPU that made it orthogonal.

    The formulas are written out here (Loshchilov and Hutter, 2019, algorithm 2; Liu et al., 2025, section 2), in fp64:
    they share nothing with the optimizer they check.
    """
    weight = trace.read(0, f"weight.{name}").double()
    by_muon = config.by_muon(name, tuple(weight.shape))
    decay = config.weight_decay if weight.dim() > 1 else 0.0
    beta1, beta2 = config.betas
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, step in enumerate(trace.steps, start=1):
        rounding = 0.0
        grad = trace.read(t, f"grad.{name}").double() * clip_factor(step.grad_norm, config.clip_norm)
        if by_muon:
            mean = config.momentum * mean + grad
            ahead = grad + config.momentum * mean
            exact, scale = _orthogonal(ahead), 0.2 * max(weight.shape) ** 0.5
            direction = scale * exact
            if step.device == "cuda":
                rounding = step.lr * scale * float((_orthogonal_in_bf16(ahead) - exact).abs().max())
        else:
            mean = beta1 * mean + (1 - beta1) * grad
            square = beta2 * square + (1 - beta2) * grad**2
            direction = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + config.eps)
        weight = weight * (1 - step.lr * decay) - step.lr * direction
        yield weight, rounding


def _orthogonal(x: Tensor) -> Tensor:
    """Five steps of p(s) = 3.4445 s - 4.7750 s³ + 2.0315 s⁵, taken on the singular values themselves."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def _orthogonal_in_bf16(x: Tensor) -> Tensor:
    """The same by products of matrices, each of which is rounded to bf16, as a GPU does it."""
    y = x.bfloat16() if x.shape[0] <= x.shape[1] else x.mT.bfloat16()
    y = y / y.norm()
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return (y if x.shape[0] <= x.shape[1] else y.mT).double()
