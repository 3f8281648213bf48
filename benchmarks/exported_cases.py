"""A small model of each family that `weft export` writes, in shapes that vLLM's kernels for CPUs take."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.export.huggingface import export_huggingface

Table = dict[str, Any]

VOCAB = 320
COMMON: Table = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
LATENT: Table = COMMON | {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 48, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA3: Table = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NATIVE_ROPE: Table = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""With `enforce_eager` vLLM's rotary kernel for CPUs takes the slices that latent attention gives it for whole tensors."""
PLAIN_LATENT: Table = {"attention_config": {"backend": "CPU_MLA"}}
"""On a CPU with AMX vLLM chooses a kernel for latent attention that has no fp32."""


@dataclass(frozen=True)
class Case:
    """A model, and arguments that vLLM needs to run it on a CPU."""

    config: transformers.PretrainedConfig
    arguments: Table = field(default_factory=dict)


CASES = {
    "gpt2": Case(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": Case(transformers.LlamaConfig(**COMMON, head_dim=32)),
    "llama, scaled as 3.1": Case(transformers.LlamaConfig(**COMMON, head_dim=32, rope_parameters=LLAMA3)),
    "mistral, window of 5": Case(transformers.MistralConfig(**COMMON, head_dim=32, sliding_window=5)),
    "qwen2, tied": Case(transformers.Qwen2Config(**COMMON | {"hidden_size": 128}, tie_word_embeddings=True)),
    "qwen3": Case(transformers.Qwen3Config(**COMMON, head_dim=64)),
    "mixtral": Case(
        transformers.MixtralConfig(
            **COMMON, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        )
    ),
    "qwen3_moe": Case(
        transformers.Qwen3MoeConfig(
            **COMMON, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        )
    ),
    "deepseek_v2": Case(transformers.DeepseekV2Config(**LATENT), NATIVE_ROPE | PLAIN_LATENT),
    "deepseek_v3": Case(transformers.DeepseekV3Config(**LATENT, n_group=2, topk_group=1), NATIVE_ROPE | PLAIN_LATENT),
    "deepseek_v3, vLLM's own RoPE": Case(
        transformers.DeepseekV3Config(**LATENT, n_group=2, topk_group=1), PLAIN_LATENT
    ),
    "deepseek_v3, as vLLM chooses": Case(transformers.DeepseekV3Config(**LATENT, n_group=2, topk_group=1)),
}  # fmt: skip


def prepare(case: Case, root: Path, prompts: list[list[int]]) -> None:
    """A model as it is published, and two folders for vLLM with what weft exports of it."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(case.config)
    for each, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "rotary" not in each:
            is_norm = tensor.dim() == 1 and each.endswith("weight")
            torch.nn.init.normal_(tensor, mean=float(is_norm), std=0.1)
    model.save_pretrained(root / "source")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        folder = root / name
        export_huggingface(root / "source", folder / "model", dtype)
        (folder / "dtype").write_text(name, encoding="utf-8")
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        (folder / "arguments.json").write_text(json.dumps(case.arguments), encoding="utf-8")
