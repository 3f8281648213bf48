"""Models that weft does not have, planned in their sizes. Numbers of parameters are those of the models' own cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.cli.app import app
from weft.plan.stand_in import stand_in

GEMMA = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
    "sliding_window": 4096, "sliding_window_pattern": 2,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32, "experts_per_token": 4,
    "vocab_size": 201088, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
SCOUT = {
    "model_type": "llama4", "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "vocab_size": 202048,
        "hidden_act": "silu", "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
PHI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": 2047,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880,
         "layer_norm_epsilon": 1e-5}  # fmt: skip
NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
    "attn_config": {"kv_n_heads": 8}, "tie_word_embeddings": False,
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "ffn_act_fn": {"name": "silu"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions", "active", "said"),
    [
        (GEMMA, 9.24, 9.24, "look at 4096"), (GPT_OSS, 20.9, 4.19, "look at 128"), (SCOUT, 108, 17.2, ""),
        (PHI, 3.82, 3.82, ""), (BLOOM, 176, 176, ""), (NEOX, 20.6, 20.6, ""), (DBRX, 132, 36.5, ""),
    ],
)  # fmt: skip
def test_it_has_as_many_parameters(config: dict[str, Any], billions: float, active: float, said: str) -> None:
    shape, remarks = stand_in(config)
    assert shape.num_params / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_params / 1e9 == pytest.approx(active, rel=0.01)
    assert said in remarks[-1]
    assert len(remarks) == 1 + bool(said)


def test_what_sizes_mean() -> None:
    assert stand_in(PHI)[0].sliding_window == 2047
    assert stand_in(GEMMA)[0].sliding_window is None, "every second block looks at everything"
    assert stand_in({**PHI, "use_sliding_window": False})[0].sliding_window is None
    assert stand_in(GEMMA)[0].tied
    assert not stand_in(PHI)[0].tied
    assert stand_in(BLOOM)[0].activation == "gelu"
    assert stand_in({**BLOOM, "multi_query": True})[0].num_kv_heads == 1
    latent = {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    shape, remarks = stand_in({**PHI, **latent, "index_topk": 2048})
    assert shape.latent is not None
    assert shape.head_dim == 192
    assert "picked" in remarks[-1]
    listed = {"num_experts": 8, "num_experts_per_tok": 2, "moe_layer_freq": [0, 0, *30 * [1]]}
    experts = stand_in({**PHI, **listed, "shared_expert_intermediate_size": 16384})[0].experts
    assert experts is not None
    assert (experts.dense_layers, experts.shared, experts.ffn) == (2, 2, 8192)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba2"}, "mamba2"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"linear_conv_kernel_dim": 4}, "linear_conv_kernel_dim"),
        ({"model_type": "bert", "type_vocab_size": 2}, "no decoder"),
        ({"is_encoder_decoder": True}, "no decoder"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "draft"),
        ({"block_configs": [{}]}, "block_configs"),
        ({"q_lora_rank": 1536}, "without kv_lora_rank"),
        ({"num_experts": 8}, "how many of its experts"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2}, "take turns"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "moe_layer_freq": [0, 1, 0, 1]}, "take turns"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 5}, "must divide"),
    ],
)
def test_what_it_does_not_stand_in_for(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stand_in({**PHI, **change})


def test_a_plan_says_so_and_nothing_is_written_for_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PHI, "quantization_config": {}}))
    words = ["plan", "layouts", str(file), "--cluster", "h100x8", "--batch", "64"]
    app(words, standalone_mode=False)
    out, err = capsys.readouterr()
    assert "tokens/s" in out
    assert "Phi3ForCausalLM" in err
    assert "3.82B parameters: see that this is right" in err
    with pytest.raises(ValueError, match="Phi3ForCausalLM"):
        app([*words, "--emit", "weft"], standalone_mode=False)
    file.write_text(json.dumps({**PHI, "model_type": "mamba"}))
    with pytest.raises(ValueError, match="Nor can a plan take it for another: mamba"):
        app(words, standalone_mode=False)
