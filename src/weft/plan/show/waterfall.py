"""A plan's memory and time, part by part, with what each part is. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from weft.plan.machine import Cluster
from weft.plan.memory.footprint import Footprint
from weft.plan.plan import Plan
from weft.plan.time.step import Time

TIME_WORDS = {
    "matmul": "matrix products of the blocks",
    "attention": "scores and values",
    "elementwise": "norms, activations, residuals: memory traffic",
    "head": "logits and loss, where nothing hides them",
    "recompute": "activations computed again",
    "launch": "the {unit} waits for the CPU's launches",
    "tp": "tp's messages that nothing hides",
    "cp": "cp's messages that nothing hides",
    "ep": "tokens on their way to experts and back",
    "dp": "gradients and weights between replicas, what is not hidden",
    "pp": "messages between stages",
    "bubble": "the pipeline fills and drains",
    "optimizer": "the update",
    "offload": "activations or weights on their way to the CPU and back, what is not hidden",
    "rest": "data, logs, the slowest of many {units}",
}
MEMORY_WORDS = {
    "weights": "this process's share",
    "gradients": "this process's share",
    "optimizer": "moments, and master weights where there are any",
    "gathered": "whole or low-precision weights of the blocks at work",
    "activations": "kept for backward, of all micro-batches in flight",
    "working": "inside of one block",
    "logits": "with their gradient and the loss's workspace",
    "outside": "what PyTorch takes for itself (a CUDA context), communicators, workspaces",
}


class Part(NamedTuple):
    name: str
    size: float
    start: float
    what: str


def time_parts(plan: Plan) -> list[Part]:
    """Seconds, in the order of the model, each on top of those before."""
    return _parts(plan.time, TIME_WORDS, plan.cluster)


def memory_parts(plan: Plan) -> list[Part]:
    """Bytes."""
    return _parts(plan.memory, MEMORY_WORDS, plan.cluster)


def _parts(of: Time | Footprint, words: dict[str, str], cluster: Cluster) -> list[Part]:
    found, start = [], 0.0
    for name, what in words.items():
        size = float(getattr(of, name))
        if size > 0:
            found.append(Part(name, size, start, what.format(unit=cluster.unit, units=cluster.units)))
            start += size
    return found


def slower(plan: Plan, winner: Plan) -> str:
    """How much more time a step takes; nothing has no sign but +."""
    return f"{round(100 * (plan.seconds / winner.seconds - 1), 1) + 0.0:+.1f} %"


def why_slower(plan: Plan, winner: Plan) -> str:
    """The part of the time that tells two plans apart most, and whether the slower is tight, too; or that it is none, for
    the plan is faster but tight."""
    tight = winner.sure and not plan.sure
    if tight and plan.seconds < winner.seconds:
        return "tight memory"
    differences = {name: getattr(plan.time, name) - getattr(winner.time, name) for name in TIME_WORDS}
    most = max(differences, key=lambda name: differences[name])
    return f"{most} +{1000 * differences[most]:,.0f} ms{', tight' if tight else ''}"
