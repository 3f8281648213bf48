"""What each part of a model gives in its first forward pass, as regions of the whole [B, T, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.checkpoint.region import Piece, Region
from weft.config.layout import Layout
from weft.config.tree import Config
from weft.models.shape import Shape
from weft.train.training import Training


class OutputRecorder:
    """Listens to a model's parts while it works through one step, micro-batch by micro-batch."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.pieces: list[Piece] = []
        self.seen: dict[str, int] = {}  # rows of this process that have gone through a module
        modules = dict(training.woven.model.named_modules())
        names = [name for name in heard(training.config.layout, training.config.model) if modules.get(name) is not None]
        self.handles = [modules[name].register_forward_hook(self._listen(name)) for name in names]

    def close(self) -> list[Piece]:
        """Stop listening; what was heard."""
        for handle in self.handles:
            handle.remove()
        return self.pieces

    def _listen(self, name: str) -> Any:
        config, mesh = self.training.config, self.training.mesh
        rows, sizes = self.training.rows, output_sizes(config)[f"output.{name}"]

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            first = self.seen.get(name, 0)
            self.seen[name] = first + output.shape[0]
            start = mesh.index("tp") * output.shape[1] if config.layout.sp else 0
            region = Region.whole(f"output.{name}", sizes).narrow(0, rows.start + first, rows.start + self.seen[name])
            region = region.narrow(1, start, start + output.shape[1])
            speaks = config.layout.sp or mesh.index("tp") == 0
            self.pieces.append(Piece(region, output.detach().clone(), speaks))

        return hook


def output_names(shape: Shape) -> list[str]:
    """The parts of a decoder whose output is hidden states, in the order of the forward pass."""
    blocks = [f"blocks.{index}{part}" for index in range(shape.num_layers) for part in (".attention", ".mlp", "")]
    return ["embed", *blocks, "norm"]


def heard(layout: Layout, shape: Shape) -> list[str]:
    """The parts that can be listened to under a layout.

    A compiled block shows only its result, for a listener inside would change what is compiled; one that is computed
    again in backward would be heard twice inside.
    """
    inside = not layout.compile and layout.recompute == "none"
    return [name for name in output_names(shape) if inside or name.count(".") < 2]


def output_sizes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and dims of each output in a trace."""
    dims = (config.train.global_batch, config.seq, config.model.hidden)
    return {f"output.{name}": dims for name in output_names(config.model)}
