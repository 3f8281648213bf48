"""What reports and comparisons share: the order of kinds, parts of the model, stragglers. Torch-free."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass

from weft.profile.load import Profile, Rank
from weft.profile.names import EXPOSED, LOST, WORK

KIND_WORDS = {
    "gemm": "matrix products",
    "attention": "scores and values",
    "norm": "normalisation",
    "element-wise": "activations, residuals, rotations, copies",
    "loss": "cross-entropy",
    "embedding": "look-ups",
    "optimizer": "the update, and the norm of gradients",
    "compiled": "kernels that the compiler made",
    "copy": "between the memories of host and device",
    "all exposed": "between all processes: weft's agree on loss and norm; who is early waits here",
    "bubble": "a stage waits for another, messages between them included",
    "data wait": "the next batch was not there",
    "checkpoint": "a save keeps the step up",
    "evaluation": "validation inside of the step",
    "host": "nothing is at work: Python, launches, synchronisation",
}
SLOWER = 0.05
"""By which a rank has to work longer than its peers to be named."""


def ordered(kinds: Counter[str]) -> list[tuple[str, float]]:
    """Work first, then messages, then what is lost; the largest of each first."""
    group = {**dict.fromkeys(WORK, 0), **dict.fromkeys(LOST, 2)}
    return sorted(kinds.items(), key=lambda pair: (group.get(pair[0], 1), -pair[1]))


def family(kind: str) -> str:
    """work, more, moved or idle: the colours of plan/show/page_assets."""
    if kind in ("gemm", "attention"):
        return "work"
    if kind in WORK:
        return "more"
    return "idle" if kind in LOST else "moved"


def colour(kind: str) -> str:
    return {"work": "blue", "more": "green", "moved": "dark_orange", "idle": "bright_black"}[family(kind)]


@dataclass
class Layer:
    """Seconds of a block, or of what stands beside the blocks, in a step."""

    name: str
    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0  # recomputed
    attention: float = 0.0
    mlp: float = 0.0
    norms: float = 0.0
    messages: float = 0.0
    seconds: float = 0.0

    @property
    def is_block(self) -> bool:
        return self.name.startswith("blocks.")


def by_part(profile: Profile) -> list[Layer]:
    """In the order of the model: embedding, blocks, head; then what a step does beside it. They add up to a step.
    Nothing where a trace names no blocks, as another program's does."""
    if not any(part.startswith("blocks.") for part, _, _ in profile.parts):
        return []
    layers: dict[str, Layer] = defaultdict(lambda: Layer(""))
    for (part, phase, kind), seconds in profile.parts.items():
        name, inside = split_part(part)
        layer = layers[name]
        layer.name = name
        layer.seconds += seconds
        if phase == "forward":
            layer.forward += seconds
        elif phase == "backward":
            layer.backward += seconds
        elif phase == "recompute":
            layer.again += seconds
        if inside in ("attention", "mlp"):
            setattr(layer, inside, getattr(layer, inside) + seconds)
        elif inside.endswith("norm"):
            layer.norms += seconds
        if kind.endswith(EXPOSED) or kind == "bubble":
            layer.messages += seconds
    return sorted(layers.values(), key=lambda layer: _place(layer.name))


BESIDE = "beside the model"
ORDER = {
    "embedding": 0,
    "head and loss": 2,
    "optimizer": 3,
    "data wait": 4,
    "checkpoint": 5,
    "evaluation": 6,
    BESIDE: 7,
}


def split_part(part: str) -> tuple[str, str]:
    """blocks.3.attention → blocks.3, attention; what is in no module → a word for it."""
    if part.startswith("blocks."):
        pieces = part.split(".", 2)
        return ".".join(pieces[:2]), pieces[2] if len(pieces) > 2 else ""
    if part in ("head", "loss", "norm"):
        return "head and loss", ""
    if part in ("embed", "positions"):
        return "embedding", ""
    return part or BESIDE, ""


def _place(name: str) -> tuple[int, int]:
    if name.startswith("blocks."):
        return 1, int(name.split(".")[1])
    return ORDER.get(name, 8), 0


def stragglers(profile: Profile) -> dict[int, str]:
    """Rank → why it is one: it takes longer than the others for the same work."""
    if len(profile.ranks) < 2:
        return {}
    paces = {rank.number: pace(profile, rank) for rank in profile.ranks}
    found: dict[int, str] = {}
    for rank in profile.ranks:
        others = [it for it in profile.ranks if it is not rank]
        usual = statistics.median(paces[it.number] for it in others)
        if paces[rank.number] > (1 + SLOWER) * usual:
            more = {
                kind: rank.kinds[kind] - statistics.median(it.kinds[kind] for it in others) for kind in rank.working
            }
            most = max(more, key=lambda kind: more[kind])
            late = 100 * (paces[rank.number] / usual - 1)
            found[rank.number] = f"straggler: takes {late:.0f} % longer than the others for the same, most in {most}"
    return found


def pace(profile: Profile, rank: Rank) -> float:
    """Seconds for what all ranks do alike: a step's work, or, where stages of a pipeline differ, that of a block."""
    if len(peers_of(profile)) == 1:
        return rank.busy
    blocks = [
        (split_part(part)[0], kind, it) for (part, _, kind), it in rank.parts.items() if part.startswith("blocks.")
    ]
    names = {name for name, _, _ in blocks}
    return sum(it for _, kind, it in blocks if kind in rank.working) / max(1, len(names))


def peers_of(profile: Profile) -> dict[int, list[Rank]]:
    """Ranks by stage of the pipeline: those have the same work."""
    config = profile.config
    if config is None or config.layout.pp == 1:
        return {0: list(profile.ranks)}
    inside = config.layout.world // config.layout.pp  # pp is the outermost axis: parallel/mesh.py
    found: dict[int, list[Rank]] = defaultdict(list)
    for rank in profile.ranks:
        found[rank.number // inside].append(rank)
    return dict(found)
