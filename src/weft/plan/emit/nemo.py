"""A run as a Python recipe of NeMo 2, which stands on Megatron's core. Torch-free.

Names: nemo/collections/llm/recipes, nemo/lightning/pytorch/strategies/megatron_strategy.py, September 2025.
"""

from __future__ import annotations

from typing import Any

from weft.config.tree import Config
from weft.models.shape import Experts, Shape
from weft.plan.emit import megatron
from weft.plan.emit.megatron_recompute import SELECTIVE, redone_mlp
from weft.plan.emit.settings import Written, commented, nodes_of

MODEL = {
    "num_layers": "num_layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_kv_heads",
    "kv_channels": "head_dim",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "norm_eps",
    "init_method_std": "init_std",
    "qk_layernorm": "qk_norm",
    "add_qkv_bias": "qkv_bias",
    "share_embeddings_and_output_weights": "tied",
}
"""Field of LlamaConfig → field of Shape."""


def write(config: Config, per_node: int = 8) -> Written:
    """Raises: ValueError: NeMo has no such layout or model; names the setting."""
    layout, shape, batch = config.layout, config.model, config.train.global_batch
    megatron.check(config, "NeMo")
    experts = shape.experts
    plain = experts and Experts(num_experts=experts.num_experts, per_token=experts.per_token, ffn=experts.ffn)
    refused = {
        f"model.family = {shape.family}: this file writes models with rotary positions, rmsnorm and swiglu": (
            shape.positions != "rotary" or shape.norm != "rmsnorm" or shape.activation != "swiglu" or shape.out_bias
        ),
        f"layout.zero = {layout.zero}: this file writes zero1, its distributed optimizer": (
            layout.fsdp > 1 and layout.zero != 1
        ),
        f"layout.precision = {layout.precision}: this file writes bf16": layout.precision != "bf16",
        "layout.offload_optimizer: this file does not write it": layout.offload_optimizer,
        "model.latent: this file has no words for it": shape.latent is not None,
        f"schedule.kind = {config.schedule.kind}: this file writes cosine": config.schedule.kind != "cosine",
        "model.experts: shared, dense or grouped experts, or other scores: no words for these": experts != plain,
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"NeMo: {reason}. Change it, or choose another layout with --layout")
    nodes, each = nodes_of(layout.world, per_node)
    model: dict[str, Any] = {name: getattr(shape, field) for name, field in MODEL.items()} | {"seq_length": config.seq}
    if shape.experts:
        model |= {"num_moe_experts": shape.experts.num_experts, "moe_router_topk": shape.experts.per_token}
        model |= {"moe_ffn_hidden_size": shape.experts.ffn, "moe_grouped_gemm": True}
        model |= {"moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none"}
    if shape.rope_scaling:
        model |= {"scale_factor": shape.rope_scaling.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        model |= {"old_context_len": shape.rope_scaling.original_max_seq}
    if layout.cp > 1:
        model["cp_comm_type"] = {"ring": "p2p", "allgather": "all_gather", "ulysses": "a2a"}[layout.cp_kind]
    model |= _recompute(layout.recompute, shape)
    strategy: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
    if layout.fsdp > 1 and layout.dp > 1:
        strategy["num_distributed_optimizer_instances"] = layout.dp
    sizes = [len(blocks) for blocks in layout.stage_blocks(shape)]
    if len(set(sizes)) > 1:
        strategy["pipeline_model_parallel_layout"] = megatron.stage_text(sizes)
    elif layout.vp > 1:
        strategy["virtual_pipeline_model_parallel_size"] = layout.vp
    late = (
        () if config.schedule.warmup else ("Learning rates are up to a step behind weft's, for there is no warm-up.",)
    )
    remarks = (
        "NeMo 2. Data are NeMo's mock data, and the vocabulary is the tokenizer's: put in your own.",
        *late,
        *megatron.remarks_on(config),
    )
    replaced = {
        "@remarks@": commented(remarks), "@kind@": "Llama31Config" if shape.rope_scaling else "LlamaConfig",
        "@model@": _keywords(model), "@strategy@": _keywords(strategy),
        "@nodes@": nodes, "@each@": each, "@steps@": config.train.steps, "@fp32@": layout.gradients == "fp32",
        # its scheduler counts from 0
        "@last@": max(1, config.train.steps - 1), "@warmup@": max(0, config.schedule.warmup - 1),
        "@distributed@": layout.fsdp > 1, "@seq@": config.seq, "@batch@": batch, "@micro@": layout.micro_batch_size(batch),
        "@lr@": config.optimizer.lr, "@min@": config.optimizer.lr * config.schedule.min_ratio,
        "@clip@": config.optimizer.clip_norm, "@decay@": config.optimizer.weight_decay,
        "@beta1@": config.optimizer.betas[0], "@beta2@": config.optimizer.betas[1], "@eps@": config.optimizer.eps,
    }  # fmt: skip
    text = RECIPE
    for mark, value in replaced.items():
        text = text.replace(mark, str(value))
    return Written(text, remarks)


def _recompute(text: str, shape: Shape) -> dict[str, Any]:
    if text.startswith("full"):
        method, count = ("block", int(text[5:])) if ":" in text else ("uniform", 1)
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    modules = {"selective": list(SELECTIVE), "redo-mlp": redone_mlp(shape)}
    return {"recompute_granularity": "selective", "recompute_modules": modules[text]} if text in modules else {}


def _keywords(values: dict[str, Any]) -> str:
    return "".join(f"        {name}={value!r},\n" for name, value in values.items())


RECIPE = """@remarks@import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import @kind@
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

model = run.Config(
    llm.LlamaModel,
    config=run.Config(
        @kind@,
@model@    ),
)
strategy = run.Config(
        nl.MegatronStrategy,
@strategy@        pipeline_dtype=torch.bfloat16,
        ddp=run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=@fp32@,
            use_distributed_optimizer=@distributed@,
        ),
)
precision = bf16_mixed()
precision.grad_reduce_in_fp32 = @fp32@
trainer = run.Config(
    nl.Trainer,
    num_nodes=@nodes@,
    devices=@each@,
    max_steps=@steps@,
    plugins=precision,
    strategy=strategy,
    gradient_clip_val=@clip@,
    use_distributed_sampler=False,
)
data = run.Config(
    llm.MockDataModule, seq_length=@seq@, global_batch_size=@batch@, micro_batch_size=@micro@
)
optim = run.Config(
    MegatronOptimizerModule,
    config=run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=@lr@,
        weight_decay=@decay@,
        adam_beta1=@beta1@,
        adam_beta2=@beta2@,
        adam_eps=@eps@,
        clip_grad=@clip@,
        bf16=True,
        use_distributed_optimizer=@distributed@,
    ),
    lr_scheduler=run.Config(
        CosineAnnealingScheduler, max_steps=@last@, warmup_steps=@warmup@, constant_steps=0, min_lr=@min@
    ),
)
recipe = run.Partial(llm.pretrain, model=model, trainer=trainer, data=data, optim=optim)

if __name__ == "__main__":
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=@each@, launcher="torchrun"))
"""
