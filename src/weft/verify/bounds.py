"""How far apart two runs of the same settings may be, and how that is measured."""

from __future__ import annotations

from torch import Tensor

from weft.config.tree import Config

BOUNDS: dict[str, float] = {"fp32": 1e-5, "fp16": 3e-2, "bf16": 2e-1, "fp8": 3e-1, "fp8row": 3e-1}
"""Largest difference of a gradient or an output over its norm. bf16 keeps 8 bits: 2^-8 a rounding, and hundreds of
roundings in a row through a model; two orders of the same sums differ by that much, and by no more."""
LOSS_BOUNDS: dict[str, float] = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2, "fp8": 1e-2, "fp8row": 1e-2}
"""Largest difference of a loss, over the loss."""
AMPLIFIED = 30.0
"""After the first step two layouts stand at weights that rounding has moved apart; gradients may differ by this many
times as much more, of their size or of their share of the whole, whichever is larger: what moves a small gradient (of an
expert that few tokens came to) are all weights. The most seen in 330 settings drawn at random is 23."""
MOVED_BOUND = {"fp32": 1e-2, "fp16": 1e-1, "bf16": 3e-1, "fp8": 5e-1, "fp8row": 5e-1}
"""How far all weights together may be apart, over the farthest that the optimizer could have moved them. Adam divides
a gradient by its own size: where it is nothing but rounding, the sign of the step is too."""
UPDATE_BOUND = 1e-6
"""Largest difference between a weight and what AdamW, or Muon, in one process makes of the same gradients, over what it
could have moved or its own size, whichever is larger: some units of fp32 rounding."""
MUON_ROUNDINGS = 2.0
"""On a GPU Muon makes matrices orthogonal in bf16. What that rounds off is worked out for the very matrix: between 3 % of
what the weight could have moved, where all singular values are alike, and 36 %, where they fall as 1/n². The GPU adds in
another order, so its rounding is another one of that size: together they are at most twice as far apart."""
EIGHT_BIT_BOUND = 1e-1
"""Moments of 8 bits are some per cent off, and so is what a weight moves. The first update, from moments of zero, is
exact."""
COARSER = 10.0
"""Which numbers share a scale follows from the cut: with such moments two layouts move apart by so many times as much."""
BIAS_BOUND = 1e-5
"""Of routers' biases. All move by as much, up or down, so a wrong one is far off. In fp32 only: in 16 bits rounding alone
sends some tokens elsewhere, and an expert with about the mean load then moves the other way."""
FLOOR = 1e-2
"""A gradient far below its share of the whole is rounding noise (the bias of keys has none at all, in exact numbers):
a difference is measured over no less than this part of that share."""


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of `a`, or over `floor` if that is larger."""
    a, b = a.double(), b.double()
    difference = float((a - b).norm())
    return difference / max(float(a.norm()), floor) if difference else 0.0


def coarser(config: Config, step: int) -> float:
    """How much wider the bounds of a step are where moments have 8 bits."""
    return COARSER if step > 1 and config.optimizer.states == "8bit" else 1.0


def gradient_error(a: Tensor, b: Tensor, share: float, drift: float) -> tuple[float, float]:
    """The relative difference of two gradients, and how much of it is no fault where weights have come apart.

    Args:
        share: of the norm of all gradients, what is a tensor's of this size.
        drift: the difference of all weights, over their norm.
    """
    size = max(float(a.double().norm()), FLOOR * share)
    return relative(a, b, FLOOR * share), AMPLIFIED * drift * (max(size, share) / size if size else 1.0)
