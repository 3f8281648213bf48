"""Stages of a pipeline, as Megatron-LM's arguments say them. Torch-free."""

from __future__ import annotations

import re
from typing import Any

from weft.config.pipeline import balanced, placement_of
from weft.models.shape import Shape
from weft.plan.emit.shell import Options, one


def take(there: Options, layout: dict[str, Any], shape: Shape) -> None:
    """Move the stages from the arguments into the layout."""
    pp, sizes = layout.get("pp", 1), list[int]()
    if "--pipeline-model-parallel-layout" in there:
        text = " ".join(there.pop("--pipeline-model-parallel-layout"))
        sizes = stage_sizes(text)
        if len(sizes) % pp:
            raise ValueError(
                f"--pipeline-model-parallel-layout {text}: {len(sizes)} stages are not dealt out evenly to {pp}"
            )
        vp = len(sizes) // pp
    elif "--num-virtual-stages-per-pipeline-rank" in there:
        vp = one(there, "--num-virtual-stages-per-pipeline-rank", int)
    elif "--num-layers-per-virtual-pipeline-stage" in there:
        vp = max(1, shape.num_layers // pp // max(1, one(there, "--num-layers-per-virtual-pipeline-stage", int)))
    else:
        vp = 1
        sizes = _ends(there, pp, shape.num_layers)
    if pp == 1:
        return
    if shape.num_layers < pp * vp:
        raise ValueError(
            f"--num-layers {shape.num_layers}: too few for {pp * vp} stages, of which weft's have one at least"
        )
    sizes = sizes or _without_ends(there, pp * vp, shape.num_layers)
    if vp > 1:
        layout |= {"vp": vp, "schedule": "interleaved"}
    sizes = sizes or [shape.num_layers // (pp * vp)] * (pp * vp)
    if sizes != balanced(shape, placement_of("interleaved" if vp > 1 else "1f1b", pp, vp)):
        layout["stages"] = sizes


def _ends(there: Options, pp: int, num_layers: int) -> list[int]:
    """Stages of which the first or the last has a number of blocks of its own; none where all are alike."""
    names = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
    if pp == 1 or not any(name in there for name in names):
        return []
    first, last = (one(there, name, int) if name in there else None for name in names)
    inner = pp - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // max(1, inner)
    return [*([first] if first is not None else []), *[each] * inner, *([last] if last is not None else [])]


def _without_ends(there: Options, stages: int, num_layers: int) -> list[int]:
    """Stages of as many parts each, where the embedding or the loss counts as a block."""
    ends = [there.pop(f"--account-for-{end}-in-pipeline-split", None) is not None for end in ("embedding", "loss")]
    each, rest = divmod(num_layers + sum(ends), stages)
    if not any(ends) or rest:
        return []
    return [each - ends[0], *[each] * (stages - 2), each - ends[1]]


def stage_sizes(text: str) -> list[int]:
    """Blocks of each stage of --pipeline-model-parallel-layout, such as `Et*3|(tt|)*2tL`."""
    plain = re.sub(r"[,\s\"']", "", text)
    while repeated := re.search(r"\(([^()]*)\)\*(\d+)|([EtL|])\*(\d+)", plain):
        what, times = repeated[1] or repeated[3], int(repeated[2] or repeated[4])
        plain = plain[: repeated.start()] + what * times + plain[repeated.end() :]
    if set(plain) - set("EtL|"):
        raise ValueError(f"--pipeline-model-parallel-layout {text}: weft reads E, t, L, bars and repetitions")
    return [stage.count("t") for stage in plain.split("|")]
