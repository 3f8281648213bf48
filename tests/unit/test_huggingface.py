"""weft's decoder is transformers' model: same config, same tensors, same logits, both ways."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from weft.checkpoint.region import Region
from weft.checkpoint.stacked import stacked_parts
from weft.checkpoint.weights import WeightsFolder, copy_tokenizer, create_weights_folder, load_decoder
from weft.models.decoder import Decoder
from weft.models.huggingface import config_from_shape, places, shape_from_config
from weft.models.parameters import is_stacked, stored_sizes
from weft.models.shape import Shape
from weft.presets import preset_shape

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def random_config(kind: str, seed: int) -> transformers.PreTrainedConfig:
    """A small model of a family, with what may vary varied."""
    rng = random.Random(f"{kind} {seed}")
    heads, kv = rng.choice([(4, 2), (6, 3), (4, 4), (3, 1)])
    head_dim = rng.choice([6, 8, 10])
    common: dict[str, Any] = {"vocab_size": rng.choice([50, 61]), "bos_token_id": 1, "eos_token_id": [2, 3]}
    if kind == "gpt2":
        inner = rng.choice([None, 56])
        return transformers.GPT2Config(
            n_positions=40, n_embd=heads * head_dim, n_layer=rng.choice([1, 2]), n_head=heads, n_inner=inner,
            layer_norm_epsilon=rng.choice([1e-5, 1e-3]), tie_word_embeddings=seed % 2 == 0, **common,
        )  # fmt: skip
    common |= {
        "hidden_size": heads * head_dim, "intermediate_size": rng.choice([40, 52]), "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 96,
        "rms_norm_eps": rng.choice([1e-6, 1e-2]), "tie_word_embeddings": seed % 2 == 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([100.0, 1e4])},
    }  # fmt: skip
    other_head_dim = head_dim + 2  # not hidden / heads
    if kind == "llama":
        bias = rng.choice([False, True])
        return transformers.LlamaConfig(**common, head_dim=other_head_dim, attention_bias=bias, mlp_bias=bias)
    if kind == "llama3":
        return transformers.LlamaConfig(**{**common, "rope_parameters": dict(LLAMA3)})
    if kind == "mistral":
        return transformers.MistralConfig(**common, head_dim=other_head_dim, sliding_window=rng.choice([1, 5, None]))
    if kind == "qwen2":
        return transformers.Qwen2Config(**common)
    if kind == "qwen2-window":
        return transformers.Qwen2Config(**common, use_sliding_window=True, sliding_window=7, max_window_layers=0)
    if kind == "mixtral":
        window = rng.choice([5, None])
        return transformers.MixtralConfig(
            **common, head_dim=other_head_dim, num_local_experts=rng.choice([4, 5]), sliding_window=window
        )
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common, head_dim=other_head_dim, num_experts=rng.choice([6, 8]), num_experts_per_tok=rng.choice([1, 3]),
            moe_intermediate_size=rng.choice([12, 20]), norm_topk_prob=seed % 2 == 0,
            mlp_only_layers=rng.choice([[], [0]]), use_sliding_window=seed == 1, sliding_window=5,
        )  # fmt: skip
    if kind.startswith("deepseek"):
        return random_deepseek(kind, seed, rng, common)
    assert kind == "qwen3"
    return transformers.Qwen3Config(**common, head_dim=other_head_dim)


def random_deepseek(kind: str, seed: int, rng: random.Random, common: dict[str, Any]) -> transformers.PreTrainedConfig:
    """Values as wide as keys, or narrower; queries by way of a latent vector, or not; the frequencies stretched, or not."""
    nope, rope = rng.choice([(6, 4), (4, 6), (8, 8)])
    yarn = {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 8, "beta_slow": 0.5, "mscale": 0.7,
        "mscale_all_dim": 1.2, "original_max_position_embeddings": 16,
    }  # fmt: skip
    common |= {
        "num_key_value_heads": common["num_attention_heads"], "kv_lora_rank": 12, "q_lora_rank": rng.choice([None, 14]),
        "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": rng.choice([nope + rope, nope]),
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "routed_scaling_factor": 1.7,
        "n_shared_experts": rng.choice([1, 2]), "first_k_dense_replace": rng.choice([0, 1]),
        "rope_parameters": yarn if seed % 2 else common["rope_parameters"],
    }  # fmt: skip
    if kind == "deepseek_v3":
        groups = [(4, 2), (1, 1), (2, 1)][seed % 3]
        norm = rng.choice([True, False])
        return transformers.DeepseekV3Config(
            **common, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm, num_mtp_layers=0
        )
    method = {"topk_method": "greedy"} if kind == "deepseek_v2" else {"topk_method": "group_limited_greedy"}
    return transformers.DeepseekV2Config(**common, **method, n_group=4, topk_group=2)


KINDS = (
    "gpt2", "llama", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2",
    "deepseek_v2-groups", "deepseek_v3",
)  # fmt: skip


def saved(folder: Path, config: transformers.PreTrainedConfig, **how: Any) -> torch.nn.Module:
    """transformers' model with random weights (norms and biases too), as it lies in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    model = model.to(how.pop("dtype", torch.float32)).eval()
    model.save_pretrained(folder, **how)
    return model


def loaded_by_transformers(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager", dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return max(
        ((one - other).norm() / other.norm()).item(), (one - other).abs().max().item() / other.abs().max().item()
    )


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    theirs = saved(tmp_path, random_config(kind, seed))
    shape, ours = load_decoder(tmp_path)
    tokens = torch.randint(shape.vocab, (2, 40))
    assert differ(ours(tokens), theirs(tokens).logits) < 1e-5
    assert shape.num_params == sum(parameter.numel() for parameter in theirs.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_weft_writes_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    """A decoder with weights of its own → a folder → transformers."""
    shape = shape_from_config(random_config(kind, 1).to_dict())
    torch.manual_seed(1)
    ours = Decoder(shape)
    for tensor in (*ours.parameters(), *ours.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    with create_weights_folder(tmp_path, shape, torch.float32, 9_000, tokens={"eos_token_id": 5}) as folder:
        for name, parameter in (*ours.named_parameters(), *ours.named_buffers()):
            whole = [(Region.whole(name, tuple(parameter.shape)), slice(None))]
            for region, rows in stacked_parts(shape, name) if is_stacked(name) else whole:
                folder.write(region, parameter[rows])
    assert (tmp_path / "model.safetensors.index.json").is_file()
    theirs = loaded_by_transformers(tmp_path)
    tokens = torch.randint(shape.vocab, (2, 40))
    assert differ(ours(tokens), theirs(tokens).logits) < 1e-5
    assert theirs.config.eos_token_id == 5  # type: ignore[union-attr]
    assert theirs.generation_config.eos_token_id == 5  # type: ignore[union-attr]
    assert shape_from_config(theirs.config.to_dict()) == shape  # type: ignore[operator, union-attr]


@torch.no_grad()
def test_half_precision_and_shards(tmp_path: Path) -> None:
    saved(tmp_path, random_config("qwen3", 0), dtype=torch.bfloat16, max_shard_size="10KB")
    theirs = loaded_by_transformers(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    shape, ours = load_decoder(tmp_path)
    tokens = torch.randint(shape.vocab, (2, 40))
    assert ours.embed is not None
    assert ours.embed.weight.dtype == torch.bfloat16
    assert differ(ours(tokens).float(), theirs(tokens).logits.float()) < 0.02
    _, wide = load_decoder(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert differ(wide(tokens), theirs(tokens).logits) < 1e-5


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama", 0))
    _, model = load_decoder(tmp_path)
    assert model.head is not None
    assert model.embed is not None
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("kind", KINDS)
def test_any_region_reads_and_writes_its_own_box(kind: str, tmp_path: Path) -> None:
    """Each parameter cut in four, written cut by cut and read cut otherwise, is what it was."""
    shape = shape_from_config(random_config(kind, 2).to_dict())
    whole = {name: torch.randn(dims) for name, dims in stored_sizes(shape).items()}
    with create_weights_folder(tmp_path, shape, torch.float32) as folder:
        for name, tensor in whole.items():
            for region in _quarters(Region.whole(name, tuple(tensor.shape))):
                folder.write(region, tensor[region.slices])
        for name, tensor in whole.items():
            everything = Region.whole(name, tuple(tensor.shape))
            assert torch.equal(folder.read(everything), tensor)
            for region in (everything.narrow(0, 1, 2), everything.narrow(-1, 2, 5)):
                assert torch.equal(folder.read(region), tensor[region.slices])
        folder.check()


def _quarters(region: Region) -> list[Region]:
    parts = [region]
    for dim, size in enumerate(region.sizes):
        parts = [part.narrow(dim, *ends) for part in parts for ends in ((0, size // 2), (size // 2, size))]
    return parts


def test_places_cover_every_number_once() -> None:
    for kind in KINDS:
        shape = shape_from_config(random_config(kind, 0).to_dict())
        count = {place.tensor: torch.zeros(place.sizes, dtype=torch.int) for place in places(shape).values()}
        for name, dims in stored_sizes(shape).items():
            start, stop = places(shape)[name].box((0,) * len(dims), dims)
            count[places(shape)[name].tensor][tuple(map(slice, start, stop))] += 1
        assert all(bool((tensor == 1).all()) for tensor in count.values())


# configs as they are published
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024,
    "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 25600, "max_position_embeddings": 40960, "max_window_layers": 64, "model_type": "qwen3",
    "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip

DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V3 = {  # its numbers are published in fp8, which is refused: these are of those made bf16 again
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (GPT2, "gpt2-355m"),
        (LLAMA, "llama3-8b"),
        (QWEN2, "qwen2.5-0.5b"),
        (QWEN3, "qwen3-32b"),
        (MISTRAL, "mistral-7b"),
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN3_MOE, "qwen3-30b-a3b"),
        (DEEPSEEK_V2, "deepseek-v2-lite"),
        (DEEPSEEK_V3, "deepseek-v3"),
    ],
    ids=["gpt2", "llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"],
)
def test_published_configs(config: dict[str, Any], preset: str) -> None:
    assert shape_from_config(config) == preset_shape(preset)
    # the new spelling, all defaults written out
    again = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    assert "rope_parameters" in again or config is GPT2
    assert shape_from_config(again) == preset_shape(preset)


def test_kimi_is_of_deepseeks_architecture() -> None:
    assert shape_from_config(DEEPSEEK_V3 | {"model_type": "kimi_k2"}) == shape_from_config(DEEPSEEK_V3)


ROPE: dict[str, Any] = LLAMA["rope_scaling"]  # type: ignore[assignment]
OTHER_ROPE = {"rope_type": "dynamic", "factor": 4.0}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "architectures"),
    (LLAMA, {"architectures": None, "model_type": "gemma"}, "model_type"),
    (LLAMA, {"architectures": ["LlamaForCausalLM", "X"]}, "architectures"),
    (LLAMA, {"model_type": "mistral"}, "model_type"),
    (LLAMA, {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    (LLAMA, {"attention_bias": True}, "attention_bias"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias"),
    (LLAMA, {"rope_scaling": OTHER_ROPE}, "rope_scaling.rope_type"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_scaling"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.high_freq_factor"),
    (LLAMA, {"rope_scaling": ROPE | {"beta_fast": 1}}, "rope_scaling.beta_fast"),
    (LLAMA, {"rope_scaling": ROPE | {"factor": "8"}}, "rope_scaling.factor"),
    (LLAMA, {"rope_scaling": [1]}, "rope_scaling"),
    (LLAMA, {"rope_theta": -1}, "rope_theta"),
    (LLAMA, {"rope_parameters": LLAMA3}, "rope_theta"),
    (LLAMA, {"rope_theta": 500.0, "rope_parameters": LLAMA3}, "rope_parameters"),
    (LLAMA, {"rope_scaling": None, "rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rope_theta"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window"),
    (LLAMA, {"attention_multiplier": 0.1}, "attention_multiplier"),
    (LLAMA, {"hidden_size": None}, "hidden_size"),
    (LLAMA, {"hidden_size": 4096.5}, "hidden_size"),
    (LLAMA, {"hidden_size": 4095}, "hidden_size"),
    (LLAMA, {"num_key_value_heads": 5}, "num_kv_heads"),
    (LLAMA, {"vocab_size": 0}, "vocab_size"),
    (LLAMA, {"is_causal": False}, "is_causal"),
    (GPT2, {"activation_function": "relu"}, "activation_function"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
    (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    (GPT2, {"n_head": 15}, "n_head"),
    (GPT2, {"rope_theta": 10000.0}, "rope_theta"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": 12}, "max_window_layers"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"] * 12}, "layer_types"),
    (QWEN2, {"layer_types": [["x"]] * 24}, "layer_types"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
    (QWEN2, {"max_window_layers": "all"}, "max_window_layers"),
    (QWEN2, {"head_dim": 32}, "head_dim"),
    (QWEN2, {"use_mrope": True}, "use_mrope"),
    (QWEN3, {"attention_bias": True}, "attention_bias"),
    (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
    (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types"),
    (MISTRAL, {"mlp_bias": True}, "mlp_bias"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "per_token"),
    (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob"),
    (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func"),
    (DEEPSEEK_V2, {"attention_bias": True}, "attention_bias"),
    (DEEPSEEK_V2, {"num_key_value_heads": 4}, "num_kv_heads"),
    (DEEPSEEK_V2, {"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling.beta_fast"),
    (DEEPSEEK_V2, {"first_k_dense_replace": -1}, "first_k_dense_replace"),
    (DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq"),
    (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
    (DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave"),
    (DEEPSEEK_V3, {"n_group": 7}, "groups"),
    (DEEPSEEK_V3, {"n_shared_experts": 0}, "n_shared_experts"),
    (MIXTRAL, {"num_local_experts": 0}, "num_local_experts"),
    (QWEN3_MOE, {"mlp_only_layers": [1]}, "mlp_only_layers"),
    (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    (QWEN3_MOE, {"use_sliding_window": True}, "max_window_layers"),
    (QWEN3_MOE, {"n_shared_experts": 2}, "n_shared_experts"),
]


@pytest.mark.parametrize(
    ("base", "change", "key"), REFUSED, ids=[f"{key}-{n}" for n, (_, _, key) in enumerate(REFUSED)]
)
def test_what_weft_does_not_compute_is_refused_by_name(base: dict[str, Any], change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        shape_from_config(base | change)


def test_windows_of_all_layers_are_read() -> None:
    assert shape_from_config(MISTRAL | {"sliding_window": None}).sliding_window is None
    assert shape_from_config({k: v for k, v in MISTRAL.items() if k != "sliding_window"}).sliding_window == 4096
    assert shape_from_config(QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}).sliding_window == 32768
    assert shape_from_config(QWEN2 | {"use_sliding_window": True, "max_window_layers": 24}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"family": "gpt2", "positions": "rotary"}, "positions"),
        ({"family": "gpt2", "num_kv_heads": 2}, "num_kv_heads"),
        ({"family": "gpt2", "head_dim": 4}, "head_dim times num_heads"),
        ({"family": "llama", "sliding_window": 4}, "sliding_window"),
        ({"family": "llama", "qkv_bias": True}, "qkv_bias"),
        ({"family": "llama", "qk_norm": True}, "qk_norm"),
        ({"family": "llama", "norm": "layernorm"}, "norm"),
        ({"family": "qwen2", "head_dim": 4}, "head_dim times num_heads"),
        ({"family": "qwen3", "activation": "gelu"}, "activation"),
        ({"family": "mistral", "out_bias": True}, "out_bias"),
        ({"family": "mixtral"}, "experts"),
        ({"family": "llama", "experts": {"num_experts": 4, "per_token": 2}}, "experts"),
        ({"family": "llama", "num_heads": 3, "head_dim": 8}, "hidden modulo num_heads"),
        (
            {
                "family": "deepseek_v2",
                "num_heads": 3,
                "experts": {"num_experts": 4, "per_token": 2, "shared": 1},
                "latent": {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4},
            },
            "hidden modulo num_heads",
        ),
        ({"family": "mixtral", "experts": {"num_experts": 4, "per_token": 2, "ffn": 8}}, "experts.ffn"),
    ],
)
def test_a_shape_that_cannot_be_written_is_refused(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden": 32, "num_heads": 4, "ffn": 64, "vocab": 64, "max_seq": 32}
    shape = Shape.model_validate(sizes | change)
    with pytest.raises(ValueError, match=rf"model\.{field} is .*, as whose weights this family is written, has"):
        create_weights_folder(tmp_path / "new", shape, torch.float32)
    assert not (tmp_path / "new").exists()


def _damaged(folder: Path, change: Any, config: dict[str, Any] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_missing_unexpected_and_misshaped_are_named_together(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama3", 1))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.extra"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(2, 3)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)

    _damaged(tmp_path, change)
    with pytest.raises(
        ValueError, match=r"1 missing: model\.norm\.weight; 1 unexpected: .*extra; .*lm_head\.weight \(\["
    ):
        load_decoder(tmp_path)
    with pytest.raises(ValueError, match=r"not of a floating-point type: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(tmp_path)


def test_many_missing_are_counted(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama3", 1))
    _damaged(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    with pytest.raises(ValueError, match=r"18 missing: (\S+, ){9}\S+ and 8 more"):
        load_decoder(tmp_path)


def test_buffers_of_old_files_are_ignored_and_prefixes_accepted(tmp_path: Path) -> None:
    theirs = saved(tmp_path, random_config("gpt2", 0))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    _damaged(tmp_path, change)
    shape, ours = load_decoder(tmp_path)
    tokens = torch.randint(shape.vocab, (2, 9))
    with torch.no_grad():
        assert differ(ours(tokens), theirs(tokens).logits) < 1e-5


def test_inverse_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama", 1))
    _damaged(tmp_path, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_decoder(tmp_path)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama", 0))
    _damaged(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_decoder(tmp_path)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, random_config("gpt2", 0))
    _damaged(tmp_path, lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"].clone()}))
    with pytest.raises(ValueError, match=r"one tensor twice"):
        WeightsFolder.open(tmp_path)


def test_reading_a_wrongly_shaped_or_missing_tensor_is_refused_without_check(tmp_path: Path) -> None:
    saved(tmp_path, random_config("llama", 1))
    _damaged(tmp_path, lambda t: t.pop("model.norm.weight"), {"vocab_size": 7})
    with WeightsFolder.open(tmp_path) as folder:
        with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight"):
            folder.read(Region.whole("norm.weight", (folder.shape.hidden,)))
        with pytest.raises(ValueError, match=r"embed_tokens\.weight is \[.*by config\.json it must be \[7"):
            folder.read(Region.whole("embed.weight", (7, folder.shape.hidden)))


def test_folders_that_hold_no_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        WeightsFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a table"):
        WeightsFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{" * 10_000)
    with pytest.raises(ValueError, match="is not JSON"):
        WeightsFolder.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no weights: .*pytorch_model\.bin is a pickle, which weft never opens"):
        WeightsFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": 3}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "x.safetensors"}}', "which is not there"),
        ('{"weight_map": {"a": "part.safetensors"}}', "disagree on a, b"),
    ],
)
def test_hostile_indexes(index: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file({"b": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=said):
        WeightsFolder.open(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        WeightsFolder.open(tmp_path)


def test_a_folder_is_not_created_twice(tmp_path: Path) -> None:
    shape = shape_from_config(random_config("llama", 1).to_dict())
    create_weights_folder(tmp_path, shape, torch.bfloat16).close()
    with pytest.raises(ValueError, match="holds a model already"):
        create_weights_folder(tmp_path, shape, torch.bfloat16)


def test_a_tokenizer_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    with pytest.raises(ValueError, match="auto_map"):
        copy_tokenizer(tmp_path, tmp_path)


def test_unknown_token_ids_are_written_as_null() -> None:
    """Else an architecture's default, such as Llama's 2, would end texts of another tokenizer."""
    config = transformers.AutoConfig.for_model(**config_from_shape(preset_shape("llama3-8b")))
    assert config.eos_token_id is None
    assert config.bos_token_id is None


def test_layers_after_the_last_are_passed_over(tmp_path: Path) -> None:
    """DeepSeek-V3's file holds one that predicts a token further ahead; of another family it is a tensor too many."""
    for kind, accepted in (("deepseek_v3", True), ("deepseek_v2", False)):
        saved(tmp_path / kind, random_config(kind, 0))
        tensors = load_file(tmp_path / kind / "model.safetensors")
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 2)
        save_file(tensors, tmp_path / kind / "model.safetensors", {"format": "pt"})
        with WeightsFolder.open(tmp_path / kind) as folder:
            if accepted:
                folder.check()
                continue
            with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.2\.eh_proj"):
                folder.check()
