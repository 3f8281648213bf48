"""Candidates: the layouts that a plan thinks best for a run, in weft's terms. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.plan.machine import Cluster
from weft.plan.memory import Device, largest, layout_memory
from weft.plan.numbers import Job
from weft.plan.search import Plan, search

LOOKED_AT = 400
"""Of a search, those of its order that are timed one by one."""
KEPT = ("precision", "gradients", "loss", "offload", "offload_weights", "offload_optimizer", "compile")
"""Of a layout, what a search does not decide: it stays as the run has it."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it.

    Attributes:
        seconds: of a step.
        memory: bytes of the fullest process: of tensors on a GPU, resident on a CPU.
    """

    layout: Layout
    seconds: float
    memory: int


def candidates(config: Config, cluster: Cluster, count: int, device: Device) -> list[Candidate]:
    """The best `count` that fit, the fastest first; and the run's own layout, where it takes all of the cluster.

    Raises:
        ValueError: none fits.
    """
    job = Job(seq=config.seq, global_batch=config.train.global_batch)
    found = search(config.model, job, cluster)
    kept = {name: getattr(config.layout, name) for name in KEPT}
    plans: dict[Layout, Plan] = {}  # by what they come to
    for index in found.order[:LOOKED_AT]:
        try:
            layout = Layout.model_validate({**found.layout(int(index)).model_dump(), **kept})
            if _settled(layout, job) not in plans:
                plans[_settled(layout, job)] = Plan.of(config.model, layout, job, cluster)
        except ValueError:
            continue  # weft does not run it, or not in this precision
    ranked = sorted(plans.values(), key=lambda plan: plan.seconds)
    fitting = (one for plan in ranked if (one := _candidate(config, plan, device)).memory <= cluster.memory)
    best = list(islice(fitting, count))
    if not best:
        raise ValueError(
            f"no layout of this model fits {cluster.gpus} processes of {cluster.memory_gib:.3g} GiB that `weft plan "
            "layouts` looks at: lower train.global_batch or train.seq, or take a larger cluster"
        )
    own = config.layout
    if own.world == cluster.gpus and _settled(own, job) not in [_settled(one.layout, job) for one in best]:
        best.append(_candidate(config, Plan.of(config.model, own, job, cluster), device))
    return best


def _settled(layout: Layout, job: Job) -> Layout:
    """With its micro-batch as a number."""
    return layout.model_copy(update={"micro_batch": layout.micro_batch_size(job.global_batch)})


def _candidate(config: Config, plan: Plan, device: Device) -> Candidate:
    cut = config.model_copy(update={"layout": plan.layout})
    peak = largest(layout_memory(cut, device)).peak
    return Candidate(plan.layout, plan.seconds, peak.total if device == "cpu" else peak.tensors)
