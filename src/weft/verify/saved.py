"""What two checkpoints hold, tensor by tensor: the same bits, or numbers within the bounds of parity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from weft.checkpoint.folder import MODEL, OPTIMIZER
from weft.checkpoint.load import read_state
from weft.checkpoint.region import Region
from weft.checkpoint.tensors import TensorFile
from weft.checkpoint.weights import WeightsFolder
from weft.config.tree import Config, OptimizerConfig
from weft.models.parameters import parameter_sizes, stored_sizes
from weft.verify.bounds import BOUNDS, EIGHT_BIT_BOUND, MOVED_BOUND, gradient_error
from weft.verify.layout import Difference

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


class Saved:
    """An open checkpoint. A context manager: it holds its files open."""

    def __init__(self, path: Path) -> None:
        self.stack = ExitStack()
        self.state = read_state(path)
        self.weights = self.stack.enter_context(WeightsFolder.open(path / MODEL))
        self.moments: dict[str, TensorFile] = {}
        for name in sorted((path / OPTIMIZER).glob("*.safetensors")):
            file = self.stack.enter_context(TensorFile(name))
            self.moments |= dict.fromkeys(file.entries, file)

    def read(self, kind: str, name: str) -> Tensor:
        """A weight or one of its moments, whole, whatever layout wrote it."""
        if kind == "weight":
            return self.weights.read(Region.whole(name, stored_sizes(self.weights.shape)[name]))
        return self.moments[f"{kind}.{name}"].read(f"{kind}.{name}")

    def gradient(self, kind: str, name: str, config: OptimizerConfig) -> Tensor:
        """A moment in units of a gradient: the mean of the last ones, or the root of their mean square."""
        moment, updates = self.read(kind, name).double(), self.state["optimizer_updates"]
        if kind == "exp_avg":
            return moment / (1 - config.betas[0] ** updates)
        if kind == "momentum":  # adds up, does not average
            return moment * (1 - config.momentum) / (1 - config.momentum**updates)
        return (moment / (1 - config.betas[1] ** updates)).sqrt()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def same_tensors(config: Config, a: Path, b: Path) -> Iterator[Difference]:
    """Every weight and moment of two checkpoints; the error is the count of numbers whose bits differ."""
    with Saved(a) as one, Saved(b) as other:
        for kind in ("weight", *MOMENTS):
            for name in stored_sizes(config.model) if kind == "weight" else _kept(config, kind):
                left, right = (saved.read(kind, name).contiguous().view(torch.int32) for saved in (one, other))
                yield Difference(kind, name, one.state["step"], float((left != right).sum()), 0.0)


def tensors_within_bounds(
    config: Config, a: Path, b: Path, log: Sequence[Mapping[str, Any]], k: int, precision: str
) -> Iterator[Difference]:
    """The same for checkpoints whose last steps, those after k, ran under two layouts.

    Weights: all together, over the farthest they could have moved in those steps. Moments: one by one, in units of a
    gradient, norm over norm, as gradients are compared between layouts.
    """
    names, step = list(stored_sizes(config.model)), log[-1]["step"]
    moved = sum(line["lr"] for line in log if line["step"] > k) * math.sqrt(config.model.num_params)
    norms = [line["grad_norm"] for line in log if line["grad_norm"] is not None]
    share = norms[-1] / math.sqrt(config.model.num_params) if norms else 0.0  # of one number
    with Saved(a) as one, Saved(b) as other:
        apart = size = 0.0
        for name in names:
            left, right = (saved.read("weight", name).double() for saved in (one, other))
            apart, size = apart + float((left - right).square().sum()), size + float(left.square().sum())
        yield Difference("weight", "all weights", step, math.sqrt(apart) / moved, MOVED_BOUND[precision])
        drift = math.sqrt(apart / size)
        for kind in MOMENTS:
            for name in _kept(config, kind):
                left, right = (saved.gradient(kind, name, config.optimizer) for saved in (one, other))
                error, more = gradient_error(left, right, share * math.sqrt(left.numel()), drift)
                coarse = EIGHT_BIT_BOUND * config.optimizer.in_8bit(name, tuple(left.shape))
                yield Difference(kind, name, step, error, BOUNDS[precision] + more + coarse)


def _kept(config: Config, kind: str) -> list[str]:
    """Parameters of which the optimizer keeps such a moment."""
    sizes = parameter_sizes(config.model)
    return [name for name, dims in sizes.items() if kind in config.optimizer.moments(name, dims)]
