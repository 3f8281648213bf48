"""Messages: every collective that a process takes part in, by kind and by the axis of the mesh that it runs along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from weft.exact.imagine import tree
from weft.parallel.mesh import AXES, EXPERT_AXES, WEIGHT_AXES, Mesh

KINDS = {
    "all_reduce": "all-reduce", "allreduce_": "all-reduce",
    "all_gather_into_tensor": "all-gather", "_allgather_base_": "all-gather", "allgather_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter",
    "all_to_all_single": "all-to-all", "alltoall_base_": "all-to-all",
    "send": "send", "recv_": "receive", "broadcast_": "broadcast",
}  # fmt: skip
"""Operation of torch → what it is called."""
SENT = {
    "all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "broadcast": 1.0, "send": 0.0,
    "receive": 0.0,
}  # fmt: skip
"""Of the message, times (n-1)/n, what each of n processes sends by ring algorithms; of a send, all of it."""


@dataclass(frozen=True)
class Line:
    """Messages of one kind along one axis, in one step.

    Attributes:
        size: processes that take part.
        count: how many there were.
        bytes: in all: of a gathering or an all-reduce what each process has at its end, of a scattering at its beginning,
            else what this process sends or gets.
        wire: what this process sends over its links.
    """

    kind: str
    axis: str
    size: int
    count: int
    bytes: int
    wire: int


class Messages:
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # by kind and group
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.sizes: dict[str, int] = {}

    def see(self, func: Any, args: Any) -> None:
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        kind = KINDS.get(func._schema.name.split("::")[1])
        if kind is None:
            return
        group = _group(args)
        if group.size() == 1:
            return
        key = kind, group.group_name
        self.sizes[group.group_name] = group.size()
        self.counts[key] += 1
        self.bytes[key] += _bytes(kind, args, group.size())

    def lines(self, mesh: Mesh) -> Iterator[Line]:
        """By axis, the most bytes first."""
        axes = axis_names(mesh)
        for key, count in self.counts.items():
            kind, name = key
            size = self.sizes[name]
            share = 1.0 if kind == "send" else SENT[kind] * (size - 1) / size
            yield Line(kind, axes.get(name, "all"), size, count, self.bytes[key], int(share * self.bytes[key]))


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Name of a group of this process → the axis that it runs along."""
    views = ((EXPERT_AXES, mesh.experts), (WEIGHT_AXES, mesh.weights), (AXES, mesh.devices))
    found: dict[str, str] = {view.get_group(axis).group_name: axis for axes, view in views for axis in axes}
    return found | {group.group_name: "pp" for group in (mesh.upward, mesh.ends) if group is not None}


def _group(args: Any) -> dist.ProcessGroup:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except RuntimeError:  # another object of the call, such as what adds up
                continue
    name = next(value for value in reversed(args) if isinstance(value, str))
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def _bytes(kind: str, args: Any, size: int) -> int:
    tensors = [x for x in tree(args) if isinstance(x, torch.Tensor)]
    if kind == "all-gather":  # the larger of what goes in and what comes out; of a functional one, only that goes in
        return max(x.nbytes for x in tensors) * (size if len(tensors) == 1 else 1)
    return max(x.nbytes for x in tensors)
