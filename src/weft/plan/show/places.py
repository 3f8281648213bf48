"""A layout on the GPUs of a cluster, as SVG: one picture for each axis, nodes as boxes. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from weft.config.layout import Layout
from weft.plan.machine import Cluster
from weft.plan.show.markup import Element, tag
from weft.plan.work import Num

MOST = 16384
"""GPUs that are drawn; of more, the first so many."""
TITLED = 512
"""GPUs that are named one by one where a hand is over them; of more, only colours are shown."""
WORDS = {
    "pp": "stage of the pipeline", "dp": "replica", "fsdp": "shard of the states", "cp": "part of the sequence",
    "tp": "part of each matrix", "ep": "part of the experts",
}  # fmt: skip


def coordinates(layout: Layout) -> dict[str, Num]:
    """For each axis that is cut, each rank's place on it: ranks lie as parallel/mesh.py lays them, tp innermost."""
    ranks = np.arange(layout.world)
    axes = ("pp", "dp", "fsdp", "cp", "tp")
    found = dict(zip(axes, np.unravel_index(ranks, [getattr(layout, axis) for axis in axes]), strict=True))
    found["ep"] = ranks // layout.expert_tp % layout.ep
    return {axis: place for axis, place in found.items() if getattr(layout, axis) > 1}


def group(layout: Layout, axis: str) -> list[int]:
    """The ranks that rank 0 talks to along an axis, and itself."""
    inner = {"tp": 1, "cp": layout.tp, "fsdp": layout.tp * layout.cp, "dp": layout.tp * layout.cp * layout.fsdp}
    stride = {**inner, "pp": layout.world // layout.pp, "ep": layout.expert_tp}[axis]
    return [stride * index for index in range(getattr(layout, axis))]


def draw_places(layout: Layout, cluster: Cluster) -> Iterator[Element]:
    """A figure for each axis that is cut."""
    places = coordinates(layout)
    for axis, place in places.items():
        yield tag(
            "figure",
            _picture(axis, place[:MOST], places, cluster),
            tag("figcaption", tag("b", f"{axis}{getattr(layout, axis)}"), f": {_caption(layout, axis, cluster)}"),
            class_="places",
        )


def _caption(layout: Layout, axis: str, cluster: Cluster) -> str:
    ranks = group(layout, axis)
    first = ", ".join(map(str, ranks[:3])) + (
        f", …, {ranks[-1]}" if len(ranks) > 4 else f", {ranks[-1]}" * (len(ranks) > 3)
    )
    where = "inside of a node" if ranks[-1] < cluster.per_node else "inside of an NVLink domain"
    where = where if ranks[-1] < cluster.nvlink_domain else "over the network"
    return f"{WORDS[axis]}; {cluster.units} {first} talk to each other, {where}"


def _picture(axis: str, place: Num, places: dict[str, Num], cluster: Cluster) -> Element:
    count, per_node = len(place), min(cluster.per_node, len(place))
    columns = math.ceil(per_node / 2) if per_node > 4 else per_node
    rows, num_nodes = math.ceil(per_node / columns), math.ceil(count / per_node)
    across = max(1, round(math.sqrt(num_nodes * (rows * 10 + 5) / (columns * 10 + 5) * 1.6)))
    ranks = np.arange(count)
    node, inside = ranks // per_node, ranks % per_node
    x = node % across * (columns * 10 + 5) + inside % columns * 10 + 3
    y = node // across * (rows * 10 + 5) + inside // columns * 10 + 3
    down, parts = math.ceil(num_nodes / across), int(place.max()) + 1
    boxes = "".join(
        f"M{box % across * (columns * 10 + 5) + 1} {box // across * (rows * 10 + 5) + 1}"
        f"h{columns * 10 + 2}v{rows * 10 + 2}h-{columns * 10 + 2}z"
        for box in range(num_nodes)
    )
    drawn = [tag("path", d=boxes, class_="node")]
    for part in range(parts):
        here = np.flatnonzero(place == part)
        colour = f"hsl({(210 + 300 * part / parts) % 360:.0f} 58% {'50' if part % 2 else '58'}%)"
        drawn.append(tag("path", d="".join(f"M{x[it]} {y[it]}h8v8h-8z" for it in here), fill=colour))
    if count <= TITLED:
        drawn += [
            tag("rect", tag("title", _title(cluster.unit, it, int(node[it]), places)), x=int(x[it]), y=int(y[it]),
                width=8, height=8, fill="transparent")
            for it in range(count)
        ]  # fmt: skip
    size = f"0 0 {across * (columns * 10 + 5)} {down * (rows * 10 + 5)}"
    return tag("svg", tag("title", f"every {cluster.unit}'s {WORDS[axis]}"), *drawn, viewBox=size, role="img")


def _title(unit: str, rank: int, node: int, places: dict[str, Num]) -> str:
    where = ", ".join(f"{axis} {int(place[rank])}" for axis, place in places.items())
    return f"{unit} {rank}, node {node}: {where}"
