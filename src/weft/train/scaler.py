"""The loss scaler of fp16 training: keeps small gradients above what fp16 can hold (Micikevicius et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class LossScaler:
    """Doubles the scale after a run of good steps and halves it when gradients overflow.

    `scale` is 1 for ever in the precisions that need none.
    """

    scale: float = 1.0
    good_steps: int = 0
    active: bool = False
    patience: int = 2000  # good steps before the next try of a larger scale

    @classmethod
    def of(cls, precision: str) -> LossScaler:
        return cls(scale=2.0**16, active=True) if precision == "fp16" else cls()

    def overflowed(self, loss: float) -> bool:
        """Take note of gradients that are not finite. True: the scale was to blame, not the loss, and is lower now."""
        if not self.active or self.scale <= 1 or not math.isfinite(loss):
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def succeeded(self) -> None:
        if not self.active:
            return
        self.good_steps += 1
        if self.good_steps % self.patience == 0:
            self.scale *= 2

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps, "active": self.active}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint; one of a precision without a scale says nothing about this one's."""
        if self.active and state["active"]:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
