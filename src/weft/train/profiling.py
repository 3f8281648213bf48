"""What of a training gets a name in a trace, and what the report has to know of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import weft
from weft.models.moe import Experts, MoE
from weft.parallel.mesh import AXES, EXPERT_AXES, WEIGHT_AXES, Mesh
from weft.parallel.pipeline import Pipeline
from weft.parallel.woven import Passes
from weft.profile.capture import Capture
from weft.profile.ranges import Ranges, Wrap
from weft.train import step as steps
from weft.train.hardware import peak_flops
from weft.train.training import Training

PARTS = ("attention_norm", "attention", "mlp_norm", "mlp")
OUTSIDE = ("embed", "positions", "norm", "head")
MESSAGES = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "batch_isend_irecv",
)  # fmt: skip
FUNCTIONAL = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
AXIS_NAMES = {
    "replicate": "dp", "shard": "fsdp", "expert_replicate": "dp (experts)", "expert_shard": "fsdp (experts)", "etp": "etp",
}  # fmt: skip
"""Of the meshes of weights and experts, as the layout's axes."""


def make_capture(run: Path, training: Training, owner: Any, note: Callable[[str], None]) -> Capture:
    """Args: owner: of `next_rows`, `save` and `evaluate`, the trainer."""
    return Capture(
        run,
        training.mesh.device,
        make_ranges(training, owner),
        lambda: about(training),
        lambda: held(training),
        note,
    )


def make_ranges(training: Training, owner: Any) -> Ranges:
    """Blocks that are compiled are named as a whole: a name inside would be another block to the compiler."""
    woven = training.woven
    wanted = ("",) if training.config.layout.compile else ("", *PARTS)
    modules = {
        name: module
        for name, module in woven.modules().items()
        if name in OUTSIDE or (name.startswith("blocks.") and ".".join(name.split(".")[2:]) in wanted)
    }
    wraps = [
        Wrap(Passes, "forward", lambda _, stage, micro_batch, *__: f"op:F:{stage}:{micro_batch}"),
        Wrap(Passes, "backward", lambda _, stage, micro_batch, *__: f"op:B:{stage}:{micro_batch}"),
        Wrap(Passes, "weights", lambda _, stage, micro_batch, *__: f"op:W:{stage}:{micro_batch}"),
        Wrap(woven, "_finish_gradients", "reduce"),
        Wrap(training.optimizer, "step", "optimizer"),
        Wrap(steps, "squared_norm", "clip"),
        Wrap(steps, "scale_gradients", "clip"),
        Wrap(steps, "agree", "agree"),
        Wrap(steps, "agree_all", "agree"),
        *communication(training),
        *experts(training),
        Wrap(owner, "next_rows", "data"),
        Wrap(owner, "save", "checkpoint"),
        Wrap(owner, "evaluate", "evaluation"),
    ]
    return Ranges(modules, wraps)


def experts(training: Training) -> list[Wrap]:
    """What experts do is a part of their MLP that may be computed again by itself (parallel/recompute.py)."""
    names = {id(module.experts): name for name, module in training.woven.modules().items() if isinstance(module, MoE)}
    kinds = {type(module) for module in training.woven.modules().values() if isinstance(module, Experts)}
    return [Wrap(kind, "compute", lambda module, *_: f"module:{names[id(module)]}") for kind in kinds]


def communication(training: Training) -> list[Wrap]:
    """Every message is named by its axis, and waiting for one is a range too.

    What is compiled is left alone: there the names come from where in the model a message is.
    """
    mesh, layout = training.woven.mesh, training.config.layout
    axes = groups(mesh)
    # processes that deal out experts may be those of another axis too, whose name the group then has
    dealt = axes | ({str(mesh.group("ep").group_name): "ep"} if layout.ep > 1 else {})

    def kind(name: str) -> Callable[..., str]:
        known = dealt if name == "all_to_all_single" else axes

        def of(*args: Any, **kwargs: Any) -> str:
            given = (*args, *kwargs.values())
            if args and isinstance(args[0], list) and isinstance(args[0][0], dist.P2POp):
                given = (args[0][0].group,)
            names = [str(x.group_name) for x in given if isinstance(x, dist.ProcessGroup)]
            names += [x for x in reversed(args) if isinstance(x, str)]
            return f"comm:{known.get(names[0], 'all') if names else 'all'}"

        return of

    functions = [(dist, name) for name in MESSAGES]
    functions += [(torch.ops._c10d_functional, name) for name in FUNCTIONAL if not layout.compile]
    stages = [Wrap(Pipeline, name, "comm:pp") for name in ("_expect_next", "_give") if layout.pp > 1]
    waits = [Wrap(dist.Work, name, "wait") for name in ("wait", "is_completed")]  # a poll that takes long is one too
    return [Wrap(owner, name, kind(name)) for owner, name in functions] + stages + waits


def held(training: Training) -> dict[str, int]:
    """Bytes of this process's weights and moments on its device. Gradients come and go in a step, but those in buckets of
    replicas."""
    kept = {
        "weights": [weight.data for weight in training.woven.weights],
        "optimizer": training.optimizer.tensors_kept(),
        "gradients": [
            bucket
            for chunk in training.woven.chunks.values()
            for replicas in chunk.replicas
            for bucket in replicas.buckets
        ],
    }
    here = training.mesh.device.type
    return {what: sum(x.nbytes for x in tensors if x.device.type == here) for what, tensors in kept.items()}


def about(training: Training) -> dict[str, Any]:
    """Settings, device, and which group is which axis."""
    config, device = training.config, training.mesh.device
    peak = peak_flops(device, config.layout.compute)
    return {
        "config": config.model_dump(mode="json"),
        "layout": str(config.layout),
        "device": peak.device,
        "device_type": device.type,
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "bytes_per_s": bandwidth(device),
        "memory": device_memory(device),
        "groups": groups(training.mesh),
        "versions": {"weft": weft.__version__, "torch": torch.__version__},
    }


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or a process's even share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def groups(mesh: Mesh) -> dict[str, str]:
    """Name of a process group → the axis of the layout. The group of all processes may be that of an axis too."""
    found: dict[str, str] = {}
    for axis in (*AXES, *WEIGHT_AXES, *EXPERT_AXES):
        group = mesh.group(axis)
        if group.size() > 1:
            found.setdefault(group.group_name, AXIS_NAMES.get(axis, axis))
    for other, name in ((mesh.upward, "pp"), (mesh.ends, "pp ends")):
        if other is not None:
            found[other.group_name] = name
    return found


def bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy of this device's memory reaches, both ways counted; the best of some."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best
