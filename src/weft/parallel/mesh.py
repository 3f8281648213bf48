"""Mesh: which process works on which share, and who talks to whom along each axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from weft.config.layout import Layout

AXES = ("pp", "dp", "fsdp", "cp", "tp")
"""Outermost first: tp neighbours are adjacent ranks, on the fastest links."""
WEIGHT_AXES = ("pp", "replicate", "shard", "tp")
"""The same processes as they hold weights: whoever has another part of the batch or of the sequence has the same ones."""
EXPERT_AXES = ("pp", "expert_replicate", "expert_shard", "ep", "etp")
"""And as they hold experts: dealt out over neighbours, whatever these share otherwise (folding: Liu et al., MoE Parallel
Folding, 2025)."""


@dataclass(frozen=True)
class Mesh:
    """This process's place in the layout.

    `ends` joins the processes of the first and the last stage of this process's pipeline (None elsewhere, or where both
    are one): they share a tied embedding. `upward` is a second group over the pipeline, for messages to an earlier
    process: between two processes, each group has messages one way only, which can therefore never wait for each other.
    """

    devices: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh
    device: torch.device
    indices: dict[str, int]  # this process's coordinate on each axis of all three
    ends: dist.ProcessGroup | None
    upward: dist.ProcessGroup | None

    def size(self, axis: str) -> int:
        return self.devices.size(AXES.index(axis))

    def index(self, axis: str) -> int:
        """This process's coordinate on an axis."""
        return self.indices[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        views = ((AXES, self.devices), (WEIGHT_AXES, self.weights), (EXPERT_AXES, self.experts))
        return next(view for axes, view in views if axis in axes).get_group(axis)

    @property
    def replica(self) -> int:
        """Which share of the batch this process works on, of dp·fsdp."""
        return self.index("dp") * self.size("fsdp") + self.index("fsdp")


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Lay the processes of the default group out as `layout` says.

    Raises:
        ValueError: the layout takes another number of processes.
    """
    if dist.get_world_size() != layout.world:
        raise ValueError(f"layout {layout} takes {layout.world} processes, and {dist.get_world_size()} were started")
    sizes = {
        AXES: [getattr(layout, axis) for axis in AXES],
        WEIGHT_AXES: [layout.pp, *layout.weight_ways, layout.tp],
        EXPERT_AXES: [layout.pp, *layout.expert_ways, layout.ep, layout.expert_tp],
    }
    views = [init_device_mesh(device.type, tuple(ways), mesh_dim_names=axes) for axes, ways in sizes.items()]
    ends, upward = _pipeline_groups(views[0], layout.place) if layout.pp > 1 else (None, None)
    indices = {axis: view.get_local_rank(axis) for view in views[::-1] for axis in view.mesh_dim_names or ()}
    devices, weights, experts = views
    return Mesh(devices, weights, experts, device, indices, ends, upward)


def _pipeline_groups(
    devices: DeviceMesh, place: tuple[int, ...]
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Every process makes every group, in the same order, and keeps its own."""
    ends = upward = None
    rank = dist.get_rank()
    for line in devices.mesh.reshape(devices.mesh.shape[0], -1).t().tolist():
        group = dist.new_group(line)
        upward = group if rank in line else upward
        if place[0] != place[-1]:
            pair = [line[place[0]], line[place[-1]]]
            tie = dist.new_group(pair)
            ends = tie if rank in pair else ends
    return ends, upward
