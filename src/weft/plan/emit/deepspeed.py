"""A run as a DeepSpeed JSON, and back: batch, ZeRO stage, precision, optimizer. Torch-free.

Keys: deepspeed/runtime/constants.py and deepspeed/runtime/zero/config.py, August 2026. The file has no word on the model,
on the sequence, or on cuts of the model: those are in a program of one's own.
"""

from __future__ import annotations

import json
import re
from math import isclose
from typing import Any

from weft.config.load import make_config
from weft.config.tree import Config, TrainConfig
from weft.models.shape import Shape
from weft.plan.emit.settings import Written, put, setting

KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "layout.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}
"""Key ↔ setting, the same value."""
SCHEDULES = {"cosine": "WarmupCosineLR", "linear": "WarmupDecayLR", "constant": "WarmupLR"}
"""schedule.kind → type of its scheduler."""
LATE = {"cosine": 1, "linear": 2, "constant": 2}
"""schedule.kind → steps after which its scheduler does what weft does: runtime/lr_schedules.py counts from -1, and is asked
after the step; the cosine counts one more when it decays."""
OWN = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
"""optimizer.params where the file leaves them out: ops/adam/fused_adam.py."""


def write(config: Config, per_node: int = 8) -> Written:
    """Raises: ValueError: the JSON has no key for a part of the layout; names the setting."""
    layout = config.layout
    refused = {
        f"layout.pp = {layout.pp}: stages are cut in the program (PipelineModule)": layout.pp > 1,
        f"layout.tp = {layout.tp}: matrices are cut in the program": layout.tp > 1,
        f"layout.cp = {layout.cp}: sequences are cut in the program": layout.cp > 1,
        f"layout.ep = {layout.ep}: experts are dealt out in the program (deepspeed.moe)": layout.ep > 1,
        f"layout.precision = {layout.precision}: fp8 is the program's": layout.precision.startswith("fp8"),
        "layout.dp beside layout.fsdp: it shards over all replicas, since 0.19 has no MiCS": (
            layout.dp > 1 and layout.fsdp > 1
        ),
        "layout.offload: its CPU offload is of weights and optimizer states": layout.offload,
        f"optimizer.kind = {config.optimizer.kind}: this file writes adamw only": config.optimizer.kind != "adamw",
        f"layout.offload_weights with zero{layout.zero}: only stage 3 has weights to offload": (
            layout.offload_weights and (layout.zero != 3 or layout.fsdp == 1)
        ),
        "optimizer.states = 8bit": config.optimizer.states == "8bit",
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"a DeepSpeed JSON cannot say {reason}. Choose another layout with --layout")
    tree: dict[str, Any] = {}
    for key, path in KEYS.items():
        put(tree, key, setting(config, path))
    batch = config.train.global_batch
    tree["train_micro_batch_size_per_gpu"] = layout.micro_batch_size(batch)
    tree["gradient_accumulation_steps"] = layout.num_micro_batches(batch)
    tree["optimizer"]["type"] = "AdamW"
    remarks = [f"{layout.world} GPUs; model and sequences of {config.seq} tokens are your program's."]
    if config.schedule.kind in SCHEDULES:
        tree["scheduler"] = {"type": SCHEDULES[config.schedule.kind], "params": _schedule(config)}
        remarks += _about_rates(config)
    else:
        remarks.append(f"schedule.kind = {config.schedule.kind} is your program's.")
    if config.optimizer.weight_decay:
        remarks.append(
            "Norms and biases decay too, but where your program puts them into a group without weight_decay."
        )
    zero: dict[str, Any] = {"stage": layout.zero if layout.fsdp > 1 else 0}
    if layout.offload_optimizer or layout.offload_weights:
        zero["offload_optimizer"] = {"device": "cpu"}
    if layout.offload_weights:
        zero["offload_param"] = {"device": "cpu"}
    tree["zero_optimization"] = zero
    if layout.precision in ("bf16", "fp16"):
        tree[layout.precision] = {"enabled": True}
    added_up: str = layout.gradients
    if not zero["stage"] and layout.precision != added_up:  # else it ends with "unsupported mix"
        remarks.append(f"Gradients are {layout.precision}: without ZeRO it adds them up as it computes.")
        added_up = layout.precision
    tree["data_types"] = {"grad_accum_dtype": added_up}
    if not zero["stage"] and layout.precision != "fp32":
        remarks.append("Adam's first step counts as its second: without ZeRO an empty one comes before it.")
    remarks += [f"layout.recompute = {layout.recompute} is your program's."] if layout.recompute != "none" else []
    remarks += ["layout.loss = chunked is your program's."] if layout.loss == "chunked" else []
    remarks += ["layout.compile: engine.compile() in your program."] if layout.compile else []
    return Written(json.dumps(tree, indent=2) + "\n", tuple(remarks))


def _schedule(config: Config) -> dict[str, Any]:
    """Its scheduler's settings, said earlier by as many steps as it is late."""
    peak, schedule = config.optimizer.lr, config.schedule
    late = LATE[schedule.kind]
    start = late / schedule.warmup if _is_warmed(config) else 1.0
    ends = {"total_num_steps": max(1, config.train.steps - late)}
    own: dict[str, dict[str, Any]] = {
        "cosine": {**ends, "cos_min_ratio": schedule.min_ratio, "warmup_min_ratio": start},
        "linear": {**ends, "warmup_min_lr": peak * schedule.min_ratio, "warmup_max_lr": peak},
        "constant": {"warmup_min_lr": peak * start, "warmup_max_lr": peak},
    }
    steps = schedule.warmup - late if _is_warmed(config) else 1
    return {**own[schedule.kind], "warmup_num_steps": steps, "warmup_type": "linear"}


def _is_warmed(config: Config) -> bool:
    """Its warm-ups count to two at least: a shorter one is left out."""
    return config.schedule.warmup >= LATE[config.schedule.kind] + 2


def _about_rates(config: Config) -> list[str]:
    if config.schedule.kind == "constant" and config.schedule.warmup <= 1:
        return []
    low = config.optimizer.lr * config.schedule.min_ratio
    differing = {
        ("cosine", True): "in the warm-up, where they are of the step before, and 0 in the first",
        ("cosine", False): "in the first three steps, 0 and then the peak, after which the descent begins",
        ("linear", True): f"in the warm-up, which goes from {low:g} up: its scheduler begins where it ends",
        ("linear", False): f"in the first four steps, which go from {low:g} up and after which the descent begins",
        ("constant", True): "in the first step, which has the second's",
        ("constant", False): "in a warm-up of less than four steps, which is left out",
    }
    return [f"Learning rates are weft's but {differing[config.schedule.kind, _is_warmed(config)]}."]


OLD = "zero_optimization.cpu_offload"
"""What stood for offload_optimizer before 0.3.16."""
HOW = re.compile(
    r"(steps_per_print|wall_clock_breakdown|memory_breakdown|dump_state|_?comment|tensorboard|monitor_config|csv_monitor|"
    r"wandb|flops_profiler|comms_logger|comms_config|zero_allow_untested_optimizer|zero_force_ds_cpu_optimizer)\b|"
    r"zero_optimization\.(overlap_comm|contiguous_gradients|reduce_scatter|reduce_bucket_size|allgather_\w+|sub_group_size|"
    r"round_robin_gradients|stage3_\w+|max_live_parameters|max_reuse_distance|\w+_on_model_save|"
    r"offload_\w+\.(pin_memory|buffer_count|buffer_size|fast_init))$"
)
"""Keys that say how, not what: weft has no setting for them."""
SECTIONS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "optimizer",
    "scheduler", "fp16", "bf16",
)  # fmt: skip
"""Any of them makes a JSON one of DeepSpeed's."""


def read(text: str, model: Shape | None = None, gpus: int | None = None) -> tuple[Config, list[str]]:
    """The run, and every key that was not understood.

    Args:
        model: the JSON never says it.
        gpus: needed where the batch is not told in all three parts.

    Raises:
        ValueError: something is missing, or weft does not have it; names the key.
    """
    if model is None:
        raise ValueError("a DeepSpeed JSON does not say the model: name it with --model")
    try:
        flat = dict(_leaves("", json.loads(text)))
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is no JSON: {error}") from None
    if not any(key.partition(".")[0] in SECTIONS for key in flat):
        raise ValueError(f"the file is not DeepSpeed's: it has none of {', '.join(SECTIONS)}")
    tree: dict[str, Any] = {"model": model.model_dump(), "layout": {}}
    taken = {key: flat.pop(key) for key in list(flat) if flat[key] != "auto" and _is_known(key, flat[key])}
    if "optimizer.type" in taken:
        own: dict[str, Any] = {f"optimizer.params.{name}": value for name, value in OWN.items()}
        taken = {key: value for key, value in own.items() if key not in flat} | taken
        put(tree, "schedule.kind", "constant")
    for key, path in KEYS.items():
        if key in taken:
            put(tree, path, taken[key])
    asked = [key for key, value in flat.items() if value == "auto"]
    flat |= _read_schedule(tree, taken, asked)
    micro, passes = taken.get("train_micro_batch_size_per_gpu"), taken.get("gradient_accumulation_steps")
    batch = taken.get("train_batch_size")
    if gpus is None:
        if batch is None or micro is None:
            raise ValueError("the file does not say how many GPUs there are: say so with --gpus")
        gpus = batch // (micro * (passes or 1))
    if batch is None:
        put(tree, "train.global_batch", (micro or 1) * (passes or 1) * gpus)
    elif micro is None and passes:
        put(tree, "layout.micro_batch", max(1, batch // (passes * gpus)))
    # before 0.19, mics_shard_size said how many share
    stage, group = taken.get("zero_optimization.stage", 0), taken.get("zero_optimization.mics_shard_size", -1)
    layout = tree["layout"]
    if stage and gpus > 1:
        shards = group if group > 0 else gpus
        layout |= {"dp": gpus // shards, "fsdp": shards, "zero": stage}
    else:
        layout["dp"] = gpus
    for name in ("bf16", "fp16"):
        if str(taken.get(f"{name}.enabled")).lower() == "true":
            layout["precision"] = name
    if taken.get("data_types.grad_accum_dtype", layout.get("precision")) == "bf16":
        layout["gradients"] = "bf16"
    if taken.get("zero_optimization.offload_param.device") == "cpu":
        layout["offload_weights"] = True
        if taken.get("zero_optimization.offload_optimizer.device", "none") == "none":
            flat["zero_optimization.offload_optimizer"] = "none, which weft has only where weights stay too"
    elif taken.get("zero_optimization.offload_optimizer.device") == "cpu" or taken.get(OLD):
        layout["offload_optimizer"] = True
    if "scheduler.type" in taken and "scheduler.params.warmup_type" not in taken:
        flat.setdefault("scheduler.params.warmup_type", "log")  # its own
    left = [f"{key} = {json.dumps(value)}" for key, value in flat.items() if not HOW.match(key)]
    how = [key for key in flat if HOW.match(key)]
    warmup = tree.get("schedule", {}).get("warmup", 0)
    if warmup >= TrainConfig().steps and "steps" not in tree.get("train", {}):
        put(tree, "train.steps", 2 * warmup)
        left.append(f"the file does not say how many steps there are: train.steps = {tree['train']['steps']} is weft's")
    return make_config(tree), left + [f"about how, not what: {', '.join(how)}"] * bool(how)


def _read_schedule(tree: dict[str, Any], taken: dict[str, Any], asked: list[str]) -> dict[str, float]:
    """Where there is none, the rate stays what it is. Gives the start of a warm-up that weft does not have.

    `asked`: keys that are "auto", which the program fills in.
    """
    name = taken.get("scheduler.type")
    if name is None:
        return {}
    there = {key.removeprefix("scheduler.params."): value for key, value in taken.items()}
    kind = next(kind for kind, own in SCHEDULES.items() if own == name)
    put(tree, "schedule.kind", kind)
    warmup = there.get("warmup_num_steps", 0 if "scheduler.params.warmup_num_steps" in asked else 1000)
    warmup = warmup + LATE[kind] if warmup > 1 else 0
    if "total_num_steps" in there:
        put(tree, "train.steps", there["total_num_steps"] + LATE[kind])
    if kind == "cosine":
        put(tree, "schedule.min_ratio", there.get("cos_min_ratio", 1e-4))
        key, start = "warmup_min_ratio", there.get("warmup_min_ratio", 0.0)
    else:
        rate = there.get("optimizer.params.lr", 1e-3)
        filled = kind == "constant" or "scheduler.params.warmup_max_lr" in asked
        peak = there.get("warmup_max_lr", rate if filled else 1e-3)
        if "scheduler.params.warmup_max_lr" not in asked or "optimizer.params.lr" in there:
            put(tree, "optimizer.lr", peak)
        key, start = "warmup_min_lr", there.get("warmup_min_lr", 0.0) / (peak or 1.0)
        if kind == "linear":
            put(tree, "schedule.min_ratio", round(start, 6))
    put(tree, "schedule.warmup", warmup)
    own = kind == "linear" or not warmup or start == 0 or isclose(start, LATE[kind] / warmup, rel_tol=1e-6)
    return {} if own else {f"scheduler.params.{key}": there[key]}


def _leaves(path: str, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(f"{path}{key}.", value) if isinstance(value, dict) else [(path + key, value)]
    return found


def _is_known(key: str, value: Any) -> bool:
    words = {
        "optimizer.type": ("Adam", "AdamW"),
        "zero_optimization.offload_optimizer.device": ("cpu", "none"),
        "zero_optimization.offload_param.device": ("cpu", "none"),
        "data_types.grad_accum_dtype": ("fp32", "bf16", "fp16"),
        "zero_optimization.stage": (0, 1, 2, 3),
        OLD: (True, False),
        "scheduler.type": tuple(SCHEDULES.values()),
        "scheduler.params.warmup_type": ("linear",),
    }
    numbers = (
        "total_num_steps",
        "warmup_num_steps",
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_min_ratio",
        "cos_min_ratio",
    )
    if key.startswith("scheduler.params.") and key.rpartition(".")[2] in numbers:
        return isinstance(value, int | float)  # and not a list, of groups that a program has
    plain = ("gradient_accumulation_steps", "zero_optimization.mics_shard_size", "bf16.enabled", "fp16.enabled", *KEYS)
    return key in plain or value in words.get(key, ())
