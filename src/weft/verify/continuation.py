"""What is compared of a run without a break and of a resumed one: their logs, and their last checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weft.checkpoint.folder import checkpoints
from weft.checkpoint.load import read_state
from weft.config.tree import Config
from weft.train.log import read_log
from weft.train.run import Run
from weft.verify.bounds import LOSS_BOUNDS, coarser
from weft.verify.layout import Difference
from weft.verify.saved import same_tensors, tensors_within_bounds

KINDS = {
    "loss": "loss and gradient norm of each step, from the two logs",
    "weight": "each weight after the last step",
    "exp_avg": "Adam's first moment of each weight",
    "exp_avg_sq": "Adam's second moment of each weight",
    "momentum": "Muon's momentum of each matrix",
    "state": "position in the data, updates made, loss scale",
}
"""What is compared."""


@dataclass(frozen=True)
class Death:
    """Where the run was when it was killed: the last step that it had logged, and whether it was saving another one."""

    step: int
    saving: bool


@dataclass(frozen=True)
class ResumeReport:
    """What was compared of a run without a break and of one that was killed and resumed.

    Attributes:
        layouts: of the run, and of the resumed part.
        steps: at which the resumed run took up; both end at twice that.
        differences: `error` counts numbers whose bits differ where `bitwise`, else it is relative.
        deterministic: train.deterministic was set, as it is for every run on a GPU.
    """

    layouts: tuple[str, str]
    steps: int
    death: Death
    differences: list[Difference]
    deterministic: bool = False

    @property
    def bitwise(self) -> bool:
        return self.layouts[0] == self.layouts[1]

    @property
    def right(self) -> bool:
        return all(difference.right for difference in self.differences)

    def of(self, kind: str) -> list[Difference]:
        return [difference for difference in self.differences if difference.kind == kind]

    def first_wrong(self) -> Difference | None:
        """The first step of the logs that differs, else the first tensor, in the order of the model."""
        return next((difference for difference in self.differences if not difference.right), None)


def compare(unbroken: Config, resumed: Config, k: int) -> Iterator[Difference]:
    """Compare two runs of 2k steps: their logs, then the newest checkpoint of each."""
    bitwise = unbroken.layout == resumed.layout
    precision = max(unbroken.layout.precision, resumed.layout.precision, key=lambda name: LOSS_BOUNDS[name])
    runs = Run(Path(unbroken.run)), Run(Path(resumed.run))
    yield from _losses(runs, k, 0.0 if bitwise else LOSS_BOUNDS[precision] * coarser(unbroken, 2 * k))
    a, b = (checkpoints(run.checkpoints)[0] for run in runs)
    states = read_state(a), read_state(b)
    for name in ("step", "data", "optimizer_updates", *(["loss_scaler"] if bitwise else [])):
        yield Difference("state", name, states[0]["step"], float(states[0][name] != states[1][name]), 0.0)
    if bitwise:
        yield from same_tensors(unbroken, a, b)
    else:
        yield from tensors_within_bounds(unbroken, a, b, read_log(runs[0].path), k, precision)


def _losses(runs: tuple[Run, Run], k: int, bound: float) -> Iterator[Difference]:
    """Up to step k both ran alike, so the same bits are asked for."""
    logs = [read_log(run.path) for run in runs]
    for step in range(1, 2 * k + 1):
        lines = [[line for line in log if line["step"] == step] for log in logs]
        if any(len(found) != 1 for found in lines):
            yield Difference("loss", f"logged {len(lines[0])} and {len(lines[1])} times", step, math.inf, 0.0)
            continue
        (one,), (other,) = lines
        same = all(one[name] == other[name] for name in ("loss", "grad_norm", "lr"))
        if step <= k or bound == 0:
            yield Difference("loss", "loss", step, float(not same), 0.0)
        else:
            a, b = (math.nan if line["loss"] is None else line["loss"] for line in (one, other))
            yield Difference("loss", "loss", step, 0.0 if same else abs(a - b) / abs(a), bound)
