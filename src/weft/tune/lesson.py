"""Lesson: what trials have shown of a plan: by how much each part of a step is longer than it says. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.time.step import PARTS, WAITING, Time

NOISE = 0.03
"""Of a trial: what two of the same layout differ by."""
KNOWN = np.array([0.45 if part in WAITING else 0.12 for part in PARTS])
"""How well a plan knows each part, as `Time.spread` has it."""
NEAR = 3.0
"""A part's scale is within this, and its inverse, of the common one."""


@dataclass(frozen=True)
class Lesson:
    """A scale for each part of `Time`."""

    scales: NDArray[np.float64]

    @classmethod
    def none(cls) -> Lesson:
        """The plan as it is."""
        return cls(np.ones(len(PARTS)))

    @classmethod
    def of(cls, trials: Sequence[tuple[Time, float]]) -> Lesson:
        """What follows from the predicted parts of steps, and the seconds that were measured of each.

        Each trial says that its parts, each times its scale, add up to what was measured, as well as a trial says that.
        There are more parts than trials: what they leave open is what all parts have in common, as well as a plan knows
        each; least squares of all of it (ridge regression, Hoerl and Kennard, 1970).
        """
        if not trials:
            return cls.none()
        shares = np.array([_parts(time) / measured for time, measured in trials])
        sums = shares.sum(axis=1)
        common = float(sums.sum() / (sums**2).sum())  # the one scale with the least error
        matrix = np.vstack([shares / NOISE, np.diag(1 / (KNOWN * common))])
        wanted = np.concatenate([np.full(len(trials), 1 / NOISE), 1 / KNOWN])
        scales = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        return cls(np.clip(scales, common / NEAR, common * NEAR))

    def expected(self, time: Time) -> float:
        """Seconds of a step."""
        return float(_parts(time) @ self.scales)


def _parts(time: Time) -> NDArray[np.float64]:
    return np.array([float(getattr(time, part)) for part in PARTS])
