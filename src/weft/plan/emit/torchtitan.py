"""A run as a TOML file of torchtitan 0.2. Torch-free.

Keys: torchtitan/config/job_config.py of version 0.2; later versions take Python functions instead of files.
"""

from __future__ import annotations

from math import inf
from typing import Any

from weft.config.toml import toml_text
from weft.config.tree import Config
from weft.models.shape import RopeScaling, Shape
from weft.plan.emit.settings import Written, commented
from weft.presets import preset_shape

FLAVORS = {
    "llama3-8b": ("llama3", "8B"), "llama3-70b": ("llama3", "70B"), "llama3-405b": ("llama3", "405B"),
    "qwen3-0.6b": ("qwen3", "0.6B"), "qwen3-8b": ("qwen3", "8B"), "qwen3-32b": ("qwen3", "32B"),
    "qwen3-30b-a3b": ("qwen3", "30B-A3B"), "qwen3-235b-a22b": ("qwen3", "235B-A22B"),
    "deepseek-v3": ("deepseek_v3", "671B"),
}  # fmt: skip
"""Preset → torchtitan's name and flavor."""
OWN = "weft"
"""Name of a flavor that torchtitan does not have."""
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
        "layout.dp beside tp or pp, without fsdp: its DDP goes with nothing else": (
            layout.dp > 1 and layout.fsdp * layout.cp == 1 and layout.tp * layout.pp > 1
        ),
        f"layout.precision = {layout.precision} with tp or pp, without fsdp or cp: there it computes in fp32": (
            layout.precision != "fp32" and layout.fsdp * layout.cp == 1 and layout.tp * layout.pp > 1
        ),
        "layout.gradients = bf16: it reduces in float32": layout.gradients == "bf16",
        "layout.offload: its CPU offload is of weights": layout.offload,
        "layout.offload_optimizer: its CPU offload is of weights too": layout.offload_optimizer,
        f"optimizer.kind = {config.optimizer.kind}: this file writes adamw only": config.optimizer.kind != "adamw",
        "optimizer.states = 8bit": config.optimizer.states == "8bit",
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"torchtitan cannot run this: {reason}. Change it, or choose another layout with --layout")
    name, flavor, remark = _flavor(config.model)
    micro, passes = layout.micro_batch_size(batch), layout.num_micro_batches(batch)
    scale, scaled = _gradients(config)
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
            "max_norm": config.optimizer.clip_norm * scale or inf,  # its 0 would make all gradients 0
            "mixed_precision_param": PRECISION[layout.precision],
            "mixed_precision_reduce": "float32",
            "enable_cpu_offload": layout.offload_weights,
        },
        "optimizer": {
            "name": "AdamW", "lr": config.optimizer.lr, "eps": config.optimizer.eps * scale,
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
    remarks += [remark] if remark else []
    remarks += ["Learning rates after the warm-up are weft's of the step before."] if _decays(config) else []
    remarks += [scaled] if scaled else []
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


def _gradients(config: Config) -> tuple[float, str]:
    """Of version 0.2.2: what its gradients are times weft's, and so a clipping norm and an epsilon; and a remark."""
    layout, tokens = config.layout, config.train.global_batch * config.seq
    if layout.pp > 1:  # its pipelines go backward from the sum, and only the loss that is told is divided
        return tokens, f"Gradients are {tokens} times too large in a pipeline, and so are max_norm and eps."
    if layout.dp > 1 and layout.fsdp * layout.cp == 1:  # what has been divided by the tokens of all, DDP divides again
        return 1 / layout.dp, f"Gradients are {layout.dp} times too small under DDP, and so are max_norm and eps."
    return 1.0, ""


def _decays(config: Config) -> bool:
    return config.schedule.kind != "constant" and config.schedule.min_ratio < 1


def _flavor(shape: Shape) -> tuple[str, str, str]:
    """Model and flavor; and how the flavor is made, where it is none of torchtitan's own."""
    for preset, names in FLAVORS.items():
        if preset_shape(preset) == shape:
            return *names, ""
    own = _own_flavor(shape)
    if own is None:
        raise ValueError(
            f"torchtitan takes models by name, and this one is none of {', '.join(FLAVORS)}, nor a Llama or Qwen3 of "
            "another size, of which a flavor can be made: name one of these, unchanged"
        )
    name, arguments = own
    return name, OWN, f'The flavor is yours to add: {name}_args["{OWN}"] = {arguments}'


def _own_flavor(shape: Shape) -> tuple[str, str] | None:
    """The model that has such blocks, and the arguments that make it this size."""
    scaling = shape.rope_scaling
    sizes = (
        f"dim={shape.hidden}, n_layers={shape.num_layers}, n_heads={shape.num_heads}, n_kv_heads={shape.num_kv_heads}, "
        f"vocab_size={shape.vocab}, max_seq_len={shape.max_seq}, norm_eps={shape.norm_eps}, rope_theta={shape.rope_theta}"
    )
    if shape == preset_shape("llama3-8b").model_copy(update=_sizes(shape) | {"rope_scaling": scaling, "tied": False}):
        if shape.head_dim * shape.num_heads != shape.hidden:
            return None
        scaled = scaling or RopeScaling(factor=1, low_freq_factor=1, high_freq_factor=4, original_max_seq=8192)
        return "llama3", (
            f"TransformerModelArgs({sizes}, multiple_of={shape.ffn}, "
            f"ffn_dim_multiplier={shape.ffn / (8 * shape.hidden // 3)}, "
            f"rope_scaling_args=RoPEScalingArgs({scaled.factor}, {scaled.low_freq_factor}, {scaled.high_freq_factor}, "
            f"{scaled.original_max_seq}))"
        )
    if shape == preset_shape("qwen3-8b").model_copy(update=_sizes(shape)):
        return "qwen3", (
            f"Qwen3ModelArgs({sizes}, head_dim={shape.head_dim}, hidden_dim={shape.ffn}, qk_norm=True, "
            f"enable_weight_tying={shape.tied})"
        )
    return None


def _sizes(shape: Shape) -> dict[str, Any]:
    """What a model of the same kind may have otherwise."""
    names = (
        "num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab", "max_seq", "norm_eps",
        "rope_theta", "tied", "init_std",
    )  # fmt: skip
    return {name: getattr(shape, name) for name in names}


def _parts(config: Config) -> list[list[str]]:
    """Names of the modules of each stage, in the order of the model."""
    parts = [[f"layers.{block}" for block in blocks] for blocks in config.layout.stage_blocks(config.model)]
    return [["tok_embeddings", *parts[0]], *parts[1:-1], [*parts[-1], "norm", "output"]]
