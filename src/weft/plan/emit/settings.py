"""Settings by their path in Config, such as `layout.tp`: read from one, collected for another. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.config.tree import Config


@dataclass(frozen=True)
class Written:
    """A file for another system.

    Attributes:
        text: the file, remarks and all where its format has comments.
        remarks: what that system does otherwise, or does not have.
    """

    text: str
    remarks: tuple[str, ...]


def setting(config: Config, path: str) -> Any:
    """The value of `layout.tp`; None where a section on the way is left out."""
    part: Any = config
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
    tree[name] = value


def nodes_of(world: int, per_node: int) -> tuple[int, int]:
    """Nodes, and processes of each. Raises ValueError where they do not come out even."""
    if world > per_node and world % per_node:
        raise ValueError(
            f"the layout takes {world} GPUs, which are no whole nodes of {per_node}: take another number, or say "
            "per_node in a cluster file of your own"
        )
    return max(1, world // per_node), min(world, per_node)


def commented(remarks: tuple[str, ...]) -> str:
    return "".join(f"# {remark}\n" for remark in remarks)
