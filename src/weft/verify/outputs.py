"""What each part of a model gives in its first forward pass, as regions of the whole [B, T, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.checkpoint.region import Piece, Region
from weft.config.layout import Layout
from weft.config.tree import Config
from weft.models.shape import Shape
from weft.parallel.headtail import chunks_of
from weft.parallel.mesh import Mesh
from weft.train.training import Training


class OutputRecorder:
    """Listens to a model's parts while it works through one step, micro-batch by micro-batch."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.pieces: list[Piece] = []
        self.seen: dict[str, int] = {}  # rows of this process that have gone through a module
        modules = training.woven.modules()
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
            region = Region.whole(f"output.{name}", sizes).narrow(0, rows.start + first, rows.start + self.seen[name])
            speaks = config.layout.sp or mesh.index("tp") == 0
            runs = own_runs(config.layout, mesh, config.seq)
            parts = output.detach().clone().split([len(run) for run in runs], dim=1)
            for run, part in zip(runs, parts, strict=True):
                self.pieces.append(Piece(region.narrow(1, run.start, run.stop), part, speaks))

        return hook


def own_runs(layout: Layout, mesh: Mesh, seq: int) -> list[range]:
    """The tokens of a sequence that this process has between the matrices, as runs: cut over cp, and under sp further."""
    chunks = chunks_of(seq, layout.cp, mesh.index("cp")) if layout.cp > 1 else (range(seq),)
    tokens = [token for chunk in chunks for token in chunk]
    if layout.sp:
        share = len(tokens) // layout.tp
        tokens = tokens[mesh.index("tp") * share : (mesh.index("tp") + 1) * share]
    starts = [place for place, token in enumerate(tokens) if place == 0 or token != tokens[place - 1] + 1]
    ends = [*starts[1:], len(tokens)]
    return [range(tokens[start], tokens[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


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
