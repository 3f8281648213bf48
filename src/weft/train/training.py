"""Training: what a run needs in memory — the woven model, its optimizer, its scaler — made from settings alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weft.checkpoint.region import Region
from weft.checkpoint.weights import WeightsFolder
from weft.config.tree import Config
from weft.data.loader import Batch
from weft.models.init import initial_rows
from weft.models.shape import Shape
from weft.parallel.balance import balance_experts
from weft.parallel.mesh import Mesh, make_mesh
from weft.parallel.weave import weave
from weft.parallel.woven import Rows, Woven
from weft.plan.memory.moments import Device, fitted
from weft.plan.memory.stage import stages
from weft.train.kernels import be_deterministic, choose_attention
from weft.train.optimizer import Optimizer
from weft.train.scaler import LossScaler
from weft.train.upcycle import FREE, check_upcycled, upcycled


@dataclass
class Training:
    """One process's share of a run's state."""

    config: Config
    mesh: Mesh
    woven: Woven
    optimizer: Optimizer
    scaler: LossScaler

    @property
    def rows(self) -> range:
        """Rows of the global batch that this process works on."""
        local = self.config.train.global_batch // self.config.layout.replicas
        return range(self.mesh.replica * local, (self.mesh.replica + 1) * local)

    def take(self, batch: Batch) -> Rows:
        """A batch of the loader, on the device."""

        def put(x: object) -> Tensor | None:
            return torch.as_tensor(x).to(self.mesh.device, non_blocking=True) if x is not None else None

        tokens, targets = put(batch.tokens), put(batch.targets)
        assert tokens is not None
        assert targets is not None
        return Rows(tokens, targets, put(batch.positions), put(batch.documents))


def build(config: Config, device: torch.device, *, fill: bool = True) -> Training:
    """Cut the model over the processes of the default group and give it its first weights.

    Args:
        fill: False where a checkpoint will be loaded into it.
    """
    mesh = make_mesh(config.layout, device)
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    stage = stages(config.model, config.layout)[mesh.index("pp")]
    choose_attention(config.train.attention, device)
    if config.train.deterministic:
        be_deterministic(device)
    woven = weave(config.model, fitted(config, stage, kind).layout, mesh, config.train.bucket_mib * 2**20)
    balance_experts(woven, config.balance)
    initial = partial(initial_region, config.model, config.train.seed)
    if fill and config.train.init_from is not None:
        fill_from(woven, Path(config.train.init_from), initial)
    elif fill:
        woven.fill(initial)
    optimizer = Optimizer(woven.weights, config.optimizer, mesh, offload=config.layout.offload_optimizer)
    return Training(config, mesh, woven, optimizer, LossScaler.of(config.layout.precision))


def initial_region(shape: Shape, seed: int, region: Region) -> Tensor:
    """A region of a parameter's random initial values."""
    rows = initial_rows(shape, seed, region.name, region.sizes, region.start[0], region.stop[0])
    return rows[(slice(None), *region.slices[1:])]


def fill_from(woven: Woven, folder: Path, initial: Callable[[Region], Tensor]) -> None:
    """Start from the weights in a Hugging Face folder; each process reads its regions alone. Where the folder's model has
    no experts and the run's has, they are made of its MLPs, and what is theirs alone is `initial`.

    Raises:
        ValueError: the folder holds another model.
    """
    with WeightsFolder.open(folder) as weights:
        free = {"init_std"} | ({"max_seq"} if woven.shape.positions == "rotary" else set())
        upcycling = woven.shape.experts is not None and weights.shape.experts is None
        free |= FREE if upcycling else set()
        differing = [name for name, value in woven.shape if getattr(weights.shape, name) != value and name not in free]
        if differing:
            theirs = {name: getattr(weights.shape, name) for name in differing}
            raise ValueError(f"train.init_from = {folder} holds another model than the run's: there, {theirs}")
        weights.check()
        if upcycling:
            check_upcycled(weights.shape, woven.shape)
            woven.fill(upcycled(weights, initial))
        else:
            woven.fill(lambda region: weights.read(region, torch.float32))
