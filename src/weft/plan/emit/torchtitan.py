"""A run as a TOML file of torchtitan 0.2. Torch-free.

Keys: torchtitan/config/job_config.py of version 0.2; later versions take Python functions instead of files.
"""

from __future__ import annotations

from typing import Any

from weft.config.toml import toml_text
from weft.config.tree import Config
from weft.models.shape import Shape
from weft.plan.emit.settings import Written, commented
from weft.presets import preset_shape

FLAVORS = {
    "llama3-8b": ("llama3", "8B"), "llama3-70b": ("llama3", "70B"), "llama3-405b": ("llama3", "405B"),
    "qwen3-0.6b": ("qwen3", "0.6B"), "qwen3-8b": ("qwen3", "8B"), "qwen3-32b": ("qwen3", "32B"),
    "qwen3-30b-a3b": ("qwen3", "30B-A3B"), "qwen3-235b-a22b": ("qwen3", "235B-A22B"),
    "deepseek-v3": ("deepseek_v3", "671B"),
}  # fmt: skip
"""Preset → torchtitan's name and flavor."""
SCHEDULES = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "bfs": "LoopedBFS", "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}  # fmt: skip
RECOMPUTE = {"none": "none", "full": "full", "selective": "selective"}
ROTATE = {"allgather": "allgather", "ring": "alltoall"}
PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16", "fp8row": "bfloat16"}


def write(config: Config, per_node: int = 8) -> Written:
    """Raises: ValueError: torchtitan has no such layout or model; names the setting."""
    layout, batch = config.layout, config.train.global_batch
    refused = {
        f"layout.schedule = {layout.schedule}: it has {', '.join(SCHEDULES)}": layout.schedule not in SCHEDULES,
        "layout.tp without layout.sp: its tensor parallel always cuts the sequence": layout.tp > 1 and not layout.sp,
        f"layout.zero = {layout.zero}: FSDP2 shards gradients always": layout.zero == 1,
        f"layout.recompute = {layout.recompute}: it has none, full, full/N and selective": (
            layout.recompute not in RECOMPUTE and not layout.recompute.startswith("full/")
        ),
        f"layout.cp_kind = {layout.cp_kind}: it has allgather and ring": layout.cp > 1 and layout.cp_kind not in ROTATE,
        f"layout.precision = {layout.precision}: it has bf16, fp32, fp8 and fp8row": layout.precision not in PRECISION,
        "layout.gradients = bf16: it reduces in float32": layout.gradients == "bf16",
        "layout.offload: its CPU offload is of weights": layout.offload,
        "layout.offload_optimizer: its CPU offload is of weights too": layout.offload_optimizer,
        f"optimizer.kind = {config.optimizer.kind}: this file writes adamw only": config.optimizer.kind != "adamw",
        "optimizer.states = 8bit": config.optimizer.states == "8bit",
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"torchtitan cannot run this: {reason}. Change it, or choose another layout with --layout")
    name, flavor = _flavor(config.model)
    micro, passes = layout.micro_batch_size(batch), layout.num_micro_batches(batch)
    parallel: dict[str, Any] = {
        "data_parallel_replicate_degree": layout.dp,
        "data_parallel_shard_degree": layout.fsdp,
        "fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "tensor_parallel_degree": layout.tp,
        "context_parallel_degree": layout.cp,
        "pipeline_parallel_degree": layout.pp,
        "expert_parallel_degree": layout.ep,
    }
    if layout.cp > 1:
        parallel["context_parallel_rotate_method"] = ROTATE[layout.cp_kind]
    if config.model.experts:
        parallel["expert_tensor_parallel_degree"] = layout.expert_tp
    if layout.pp > 1:
        parallel["pipeline_parallel_schedule"] = SCHEDULES[layout.schedule]
        parallel["pipeline_parallel_microbatch_size"] = micro
        parallel["module_fqns_per_model_part"] = _parts(config)
    recompute: dict[str, Any] = {"mode": RECOMPUTE.get(layout.recompute, "selective")}
    if recompute["mode"] == "selective":
        recompute["selective_ac_option"] = layout.recompute[5:] if layout.recompute.startswith("full/") else "op"
    tree: dict[str, Any] = {
        "model": {"name": name, "flavor": flavor},
        "training": {
            "local_batch_size": micro * passes if layout.pp > 1 else micro,
            "global_batch_size": batch,
            "seq_len": config.seq,
            "steps": config.train.steps,
            "max_norm": config.optimizer.clip_norm,
            "mixed_precision_param": PRECISION[layout.precision],
            "mixed_precision_reduce": "float32",
            "enable_cpu_offload": layout.offload_weights,
        },
        "optimizer": {
            "name": "AdamW", "lr": config.optimizer.lr, "eps": config.optimizer.eps,
            "beta1": config.optimizer.betas[0], "beta2": config.optimizer.betas[1],
            "weight_decay": config.optimizer.weight_decay,
        },
        "lr_scheduler": _schedule(config),
        "parallelism": parallel,
        "activation_checkpoint": recompute,
        "compile": {"enable": layout.compile},
    }  # fmt: skip
    if layout.precision.startswith("fp8"):
        tree["model"]["converters"] = ["quantize.linear.float8"]
        ends = ["output", "layers.0.", f"layers.{config.model.num_layers - 1}."]
        recipe = {"recipe_name": "rowwise"} if layout.precision == "fp8row" else {}
        tree["quantize"] = {"linear": {"float8": {**recipe, "filter_fqns": ends}}}
    remarks = [f"torchtitan 0.2, on {layout.world} GPUs. Data and tokenizer are yours to add."]
    remarks += ["Norms and biases decay too."] if config.optimizer.weight_decay else []
    if layout.schedule in ("zbv", "dualpipev"):
        remarks.append(f"{SCHEDULES[layout.schedule]}: issues 773 and 774 of torchtitan say that it is slow or fails.")
    remarks += ["layout.loss = chunked: its logits exist as a whole."] if layout.loss == "chunked" else []
    return Written(commented(tuple(remarks)) + toml_text(tree), tuple(remarks))


def _schedule(config: Config) -> dict[str, Any]:
    """Its rates, which are weft's of the step before, but for those of the warm-up."""
    schedule, steps = config.schedule, config.train.steps
    found: dict[str, Any] = {
        "warmup_steps": schedule.warmup,
        "decay_type": "linear",
        "min_lr_factor": schedule.min_ratio,
    }
    if schedule.kind == "wsd":
        return found | {"decay_ratio": schedule.descent(steps) / steps}
    own: dict[str, dict[str, Any]] = {"cosine": {"decay_type": "cosine"}, "constant": {"min_lr_factor": 1.0}}
    return found | own.get(schedule.kind, {})


def _flavor(shape: Shape) -> tuple[str, str]:
    for preset, names in FLAVORS.items():
        if preset_shape(preset) == shape:
            return names
    raise ValueError(
        f"torchtitan takes models by name, and this one is none of {', '.join(FLAVORS)}: name one of these, unchanged"
    )


def _parts(config: Config) -> list[list[str]]:
    """Names of the modules of each stage, in the order of the model."""
    parts = [[f"layers.{block}" for block in blocks] for blocks in config.layout.stage_blocks(config.model)]
    return [["tok_embeddings", *parts[0]], *parts[1:-1], [*parts[-1], "norm", "output"]]
