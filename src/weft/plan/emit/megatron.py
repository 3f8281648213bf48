"""A run as an argument list of Megatron-LM, and what of it Megatron has no argument for. Torch-free.

Names and meanings: megatron/training/arguments.py and megatron/core/transformer/transformer_config.py, August 2026.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.config.recompute import Recompute
from weft.config.tree import Config
from weft.models.shape import RopeScaling
from weft.plan.emit import megatron_experts, megatron_recompute
from weft.plan.emit.settings import Written, commented, nodes_of, setting

NUMBERS: dict[str, tuple[str, type]] = {
    "--num-layers": ("model.num_layers", int),
    "--hidden-size": ("model.hidden", int),
    "--ffn-hidden-size": ("model.ffn", int),
    "--num-attention-heads": ("model.num_heads", int),
    "--num-query-groups": ("model.num_kv_heads", int),
    "--kv-channels": ("model.head_dim", int),
    "--vocab-size": ("model.vocab", int),
    "--max-position-embeddings": ("model.max_seq", int),
    "--rotary-base": ("model.rope_theta", float),
    "--norm-epsilon": ("model.norm_eps", float),
    "--init-method-std": ("model.init_std", float),
    "--num-experts": ("model.experts.num_experts", int),
    "--moe-router-topk": ("model.experts.per_token", int),
    "--moe-ffn-hidden-size": ("model.experts.ffn", int),
    "--tensor-model-parallel-size": ("layout.tp", int),
    "--context-parallel-size": ("layout.cp", int),
    "--pipeline-model-parallel-size": ("layout.pp", int),
    "--expert-model-parallel-size": ("layout.ep", int),
    "--expert-tensor-parallel-size": ("layout.etp", int),
    "--micro-batch-size": ("layout.micro_batch", int),
    "--global-batch-size": ("train.global_batch", int),
    "--seq-length": ("train.seq", int),
    "--train-iters": ("train.steps", int),
    "--seed": ("train.seed", int),
    "--lr": ("optimizer.lr", float),
    "--adam-eps": ("optimizer.eps", float),
    "--weight-decay": ("optimizer.weight_decay", float),
    "--clip-grad": ("optimizer.clip_norm", float),
    "--lr-warmup-iters": ("schedule.warmup", int),
}
"""Argument ↔ setting, the same number."""
SWITCHES = {
    "--swiglu": ("model.activation", "swiglu", "gelu"),
    "--qk-layernorm": ("model.qk_norm", True, False),
    "--disable-bias-linear": ("model.out_bias", False, True),
    "--untie-embeddings-and-output-weights": ("model.tied", False, True),
    "--sequence-parallel": ("layout.sp", True, False),
    "--grad-reduce-in-bf16": ("layout.gradients", "bf16", "fp32"),
}
"""Argument without a value ↔ setting: what it is with the argument, and without."""
CHOICES = {
    "--normalization": ("model.norm", {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}),
    "--position-embedding-type": ("model.positions", {"rope": "rotary", "learned_absolute": "learned"}),
    "--cp-comm-type": ("layout.cp_kind", {"p2p": "ring", "all_gather": "allgather", "a2a": "ulysses"}),
    "--lr-decay-style": (
        "schedule.kind",
        {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"},
    ),
}
"""Argument ↔ setting, by other words; the first word of --cp-comm-type is Megatron's default."""
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
"""layout.zero → --data-parallel-sharding-strategy of Megatron-FSDP; 1 is the distributed optimizer."""
OFFLOADED = ("--optimizer-cpu-offload", "--use-precision-aware-optimizer")
"""layout.offload_optimizer; Megatron's offloading wants the second one too."""
GRANTED = (
    "--use-mcore-models", "--overlap-grad-reduce", "--overlap-param-gather", "--group-query-attention",
    "--accumulate-allreduce-grads-in-fp32", "--moe-grouped-gemm", "--mock-data", "--ckpt-format", "--transformer-impl",
    "--attention-backend", "--use-flash-attn", "--distributed-backend", "--DDP-impl", "--attention-softmax-in-fp32",
    "--no-masked-softmax-fusion", "--no-rope-fusion", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion", "--no-gradient-accumulation-fusion", "--cross-entropy-loss-fusion", "--moe-permute-fusion",
    "--no-async-tensor-model-parallel-allreduce", "--tp-comm-overlap", "--dataloader-type",
    "--deepspeed-activation-checkpointing",
)  # fmt: skip
"""Arguments that say how, not what: weft has no setting for them."""


def write(config: Config, per_node: int = 8) -> Written:
    """A shell script that starts Megatron-LM's pretrain_gpt.py.

    Raises:
        ValueError: Megatron-LM has no such layout or model; names the setting.
    """
    check(config, "Megatron-LM")
    nodes, each = nodes_of(config.layout.world, per_node)
    remarks = (
        "Data and tokenizer are yours to add: --data-path and --tokenizer-type, or --mock-data.",
        "Learning rates are weft's of the step before, and 0 in the first step of a warm-up.",
        *remarks_on(config),
    )
    arguments = " \\\n".join(f"    {argument}" for argument in _arguments(config))
    head = f"#!/bin/sh\n{commented(remarks)}{_environment(config)}"
    text = f"{head}torchrun --nnodes {nodes} --nproc-per-node {each} pretrain_gpt.py \\\n"
    return Written(f"{text}{arguments}\n", remarks)


def check(config: Config, system: str) -> None:
    """Refuse what Megatron's core, and so all that stands on it, cannot do.

    Raises:
        ValueError: naming the setting to change.
    """
    layout, shape, recompute = config.layout, config.model, Recompute.parse(config.layout.recompute)
    experts = shape.experts
    refused = {
        f"layout.schedule = {layout.schedule}: its pipelines run 1f1b and interleaved only": layout.schedule
        not in ("1f1b", "interleaved"),
        f"layout.precision = {layout.precision}: its fp8 has no scale for each row": layout.precision == "fp8row",
        "layout.offload: weft's is of every block, Megatron's of chosen modules": layout.offload,
        "layout.offload_weights: its weights stay on the GPU": layout.offload_weights,
        "layout.offload_optimizer: it offloads what its distributed optimizer has, zero1 with fsdp above 1": (
            layout.offload_optimizer and (layout.zero != 1 or layout.fsdp == 1)
        ),
        f"layout.recompute = {layout.recompute}: it has full, full:N, selective and redo-mlp": (
            layout.recompute not in ("none", "full", "selective", "redo-mlp")
            and (recompute.first is None or not layout.recompute.startswith("full:"))
        ),
        "model.rope_scaling: of Llama 3's it has the factor alone, the rest is 1, 4 and 8192": (
            shape.rope_scaling is not None and shape.rope_scaling != llama3_scaling(shape.rope_scaling.factor)
        ),
        f"model.rope_theta = {shape.rope_theta}: its --rotary-base is a whole number": shape.rope_theta % 1 != 0,
        "model.sliding_window: this file has no words for it": shape.sliding_window is not None,
        "layout.tp with experts needs layout.sp: its routers want the sequence cut": (
            experts is not None and layout.tp > 1 and not layout.sp
        ),
        f"optimizer.kind = {config.optimizer.kind}: this file writes adamw only": config.optimizer.kind != "adamw",
        "optimizer.states = 8bit": config.optimizer.states == "8bit",
        **megatron_experts.refused(shape),
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"{system} cannot run this: {reason}. Change it, or choose another layout with --layout")


def remarks_on(config: Config) -> tuple[str, ...]:
    """What Megatron does otherwise than weft, of this run."""
    layout = config.layout
    remarks = {
        "weft's selective keeps products and attention; Megatron's recomputes the modules that are named.": (
            layout.recompute == "selective"
        ),
        "weft's redo-mlp makes the norm before experts again, too; Megatron keeps what that gives.": (
            layout.recompute == "redo-mlp" and config.model.experts is not None
        ),
        "layout.loss = chunked: Megatron's logits exist as a whole; leave room for them.": layout.loss == "chunked",
        "layout.compile: Megatron has kernels of its own instead.": layout.compile,
        "Weights are bf16 beside an fp32 copy; weft keeps fp32 ones alone.": layout.precision not in ("fp32", "fp16"),
        "Weights are fp16 beside an fp32 copy, with a loss scale of Megatron's own.": layout.precision == "fp16",
    }
    return tuple(remark for remark, there in remarks.items() if there)


def llama3_scaling(factor: float) -> RopeScaling:
    """What --use-rope-scaling means: all but the factor is fixed in Megatron's code."""
    return RopeScaling(factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_seq=8192)


def stage_text(sizes: list[int]) -> str:
    """--pipeline-model-parallel-layout: E embedding, t a block, L loss; stages between bars, in the order of the model."""
    return "E" + "|".join(f"t*{size}" for size in sizes) + "L"


def _environment(config: Config) -> str:
    """Before Blackwell, Megatron refuses tp and cp without one connection, and its FSDP with one."""
    layout = config.layout
    one = (layout.tp > 1 or layout.cp > 1) and not (layout.fsdp > 1 and layout.zero in SHARDING)
    return "export CUDA_DEVICE_MAX_CONNECTIONS=1\n" if one else ""


def _arguments(config: Config) -> Iterator[str]:
    layout, shape = config.layout, config.model
    for name, (path, _) in NUMBERS.items():
        value = setting(config, path)
        if path == "layout.micro_batch":
            value = layout.micro_batch_size(config.train.global_batch)
        if path == "train.seq":
            value = config.seq
        if path == "model.max_seq":
            value = max(value, config.seq)
        if value is not None and not (shape.latent and path in ("model.head_dim", "model.num_kv_heads")):
            yield f"{name} {int(value) if path == 'model.rope_theta' else value}"  # a float is refused
    if not shape.latent:
        yield "--group-query-attention"
    for name, (path, there, _) in SWITCHES.items():
        if setting(config, path) == there:
            yield name
    for name, (path, words) in CHOICES.items():
        if path != "layout.cp_kind" or layout.cp > 1:
            yield f"{name} " + next(word for word, value in words.items() if value == setting(config, path))
    if shape.rope_scaling:
        yield from ("--use-rope-scaling", f"--rope-scaling-factor {shape.rope_scaling.factor}")
    if shape.qkv_bias and not shape.out_bias:
        yield "--add-qkv-bias"
    if config.schedule.kind == "wsd":
        yield from (
            "--lr-wsd-decay-style linear",
            f"--lr-wsd-decay-iters {config.schedule.descent(config.train.steps)}",
        )
    yield f"--min-lr {config.optimizer.lr * config.schedule.min_ratio:g}"
    for number, beta in enumerate(config.optimizer.betas, 1):
        yield f"--adam-beta{number} {beta}"
    yield from ("--attention-dropout 0", "--hidden-dropout 0")
    if shape.experts:
        yield from (
            "--moe-grouped-gemm",
            "--moe-token-dispatcher-type alltoall",
            "--moe-router-load-balancing-type none",
        )
    yield from megatron_experts.arguments(shape)
    yield from _pipeline(config)
    yield from _sharding(config)
    yield from _precision(config)
    yield from megatron_recompute.arguments(layout.recompute, shape)


def _pipeline(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, [len(blocks) for blocks in config.layout.stage_blocks(config.model)]
    if len(set(sizes)) > 1:
        yield f"--pipeline-model-parallel-layout '{stage_text(sizes)}'"
    elif layout.vp > 1:
        yield f"--num-virtual-stages-per-pipeline-rank {layout.vp}"


def _sharding(config: Config) -> Iterator[str]:
    layout = config.layout
    if layout.fsdp == 1:
        return
    yield "--use-distributed-optimizer"
    if layout.zero in SHARDING:
        yield from ("--use-megatron-fsdp", "--ckpt-format fsdp_dtensor")
        yield f"--data-parallel-sharding-strategy {SHARDING[layout.zero]}"
    yield from ("--overlap-grad-reduce", "--overlap-param-gather")
    if layout.dp > 1:
        yield f"--num-distributed-optimizer-instances {layout.dp}"
    if layout.offload_optimizer:
        yield from OFFLOADED


def _precision(config: Config) -> Iterator[str]:
    precision = config.layout.precision
    if precision != "fp32":
        yield "--fp16" if precision == "fp16" else "--bf16"
    if precision == "fp8":
        yield from ("--fp8-format hybrid", "--fp8-recipe tensorwise", "--first-last-layers-bf16")
        yield from ("--num-layers-at-start-in-bf16 1", "--num-layers-at-end-in-bf16 1")
    if config.layout.gradients == "fp32" and precision != "fp32":
        yield "--accumulate-allreduce-grads-in-fp32"
