"""How long a collective takes: a start, a hop for each step round the ring, the bytes over the slowest link. Torch-free.

NCCL's own model (nccl, src/graph/tuning.cc) with its rings; rates as nccl-tests counts them (bus bandwidth).
"""

from __future__ import annotations

import numpy as np

from weft.plan.time.constants import CONSTANTS as C
from weft.plan.work import Machine, Num


def near(size: Num, stride: Num, machine: Machine) -> Num:
    """Members of a group that one NVLink domain holds: every `stride`-th rank is one of them."""
    return np.clip(np.floor(machine.domain / stride), 1, size)


def crosses(size: Num, stride: Num, machine: Machine) -> Num:
    """Whether a group has members on both sides of a node whose GPUs hang on two CPUs."""
    return (machine.halves > 0) & (size > 1) & (size * stride > machine.domain / 2)


def links(members: Num, machine: Machine) -> Num:
    """Share of a GPU's links that go to so many members of its node: all of them through a switch."""
    return np.where(machine.mesh > 0, np.maximum(1, members - 1) / np.maximum(1, machine.domain - 1), 1.0)


def joined(size: Num, stride: Num, machine: Machine) -> Num:
    """Bytes/s of the bus inside a node. All groups that lie across its two CPUs share what joins these."""
    across = machine.halves / np.minimum(stride, machine.domain / 2)
    inside = machine.nvlink * C.nvlink * links(near(size, stride, machine), machine)
    return np.where(crosses(size, stride, machine), np.minimum(inside, across), inside)


def network(members: Num, machine: Machine) -> Num:
    """Bytes/s that so many members of a group in one node have of the network: each brings its own part of the adapters."""
    own = members * machine.network
    return np.where(machine.adapter > 0, np.minimum(own, machine.adapter), own)


def rate(size: Num, stride: Num, machine: Machine) -> Num:
    """Bytes/s of the bus. Members in one node share its adapters."""
    inside = near(size, stride, machine)
    nodes = np.ceil(size / inside)
    outside = network(inside, machine) * C.network * nodes**-C.falloff
    within = joined(inside, stride, machine)
    return np.where(inside >= size, within, np.minimum(outside, within))


def latency(size: Num, stride: Num, machine: Machine) -> Num:
    """Seconds of the steps round a ring; where they are many, a tree is shorter."""
    inside = near(size, stride, machine)
    nodes = np.ceil(size / inside)
    ring = (size - nodes) * C.hop_nvlink + np.where(nodes > 1, nodes, 0) * C.hop_network
    tree = 4 * np.log2(np.maximum(2, nodes)) * C.hop_network + inside * C.hop_nvlink
    return C.start + np.minimum(ring, tree)


def gather(size: Num, stride: Num, machine: Machine, volume: Num) -> Num:
    """Seconds of an all-gather, or of a reduce-scatter, of `volume` bytes in all."""
    sent = (size - 1) / size * volume
    seconds = latency(size, stride, machine) + (sent + np.minimum(C.half, sent)) / rate(size, stride, machine)
    return np.where(size > 1, seconds, 0.0)


def waited(size: Num, stride: Num, machine: Machine) -> Num:
    """Seconds more of a collective over nodes that the computation waits for, where CPU threads drive the adapters: a
    computation that goes on beside them hides that."""
    nodes = np.ceil(size / near(size, stride, machine))
    return np.where(nodes > 1, nodes * machine.wait, 0.0)


def reduce(size: Num, stride: Num, machine: Machine, volume: Num) -> Num:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather round a ring. Between two nodes NCCL's double binary
    tree is better: each node adds up inside, sends the whole once, and gets it once."""
    inside = near(size, stride, machine)
    nodes = np.ceil(size / inside)
    ring = 2 * gather(size, stride, machine, volume)
    whole = volume + np.minimum(C.half, volume)
    across = whole / (network(inside, machine) * C.network * nodes**-C.falloff)
    within = 2 * (inside - 1) / inside * whole / joined(inside, stride, machine)
    tree = 2 * latency(size, stride, machine) + np.maximum(across, within)
    return np.where((size > 1) & (nodes == 2), np.minimum(ring, tree), ring)


def all_to_all(size: Num, stride: Num, machine: Machine, volume: Num, copies: Num = 1) -> Num:
    """Seconds in which every member sends `volume` bytes, an equal part to each.

    Of a token's `copies`, a node that gets several is sent one (DeepSeek-V3, 2024, 3.2.2).
    """
    inside = near(size, stride, machine)
    nodes = np.ceil(size / inside)
    copies = np.maximum(1, copies)
    distinct = nodes * (1 - (1 - 1 / nodes) ** copies) / copies  # of the copies, to a node that has none yet
    reached = np.where(copies > 1, C.network_dealt, C.network)
    far = (size - inside) / size * distinct * volume / (machine.network * reached)
    close = (inside - 1) / size * volume / (machine.nvlink * C.nvlink * links(inside, machine))
    # half of what one side sends goes to the other
    over = (
        inside / 2 * volume / 2 * np.minimum(stride, machine.domain / 2) / np.where(machine.halves, machine.halves, 1)
    )
    close = np.where(crosses(inside, stride, machine), np.maximum(close, over), close)
    return np.where(size > 1, C.start + size * C.hop_nvlink + np.maximum(far, close), 0.0)


def send(stride: Num, machine: Machine, volume: Num) -> Num:
    """Seconds from one process to the next of a pipeline."""
    inside = machine.nvlink * C.nvlink * links(2, machine)
    return C.start + volume / np.where(stride < machine.domain, inside, machine.network * C.network)
