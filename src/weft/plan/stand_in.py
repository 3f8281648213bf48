"""Models that weft does not have, for a plan: the blocks that it has, in the sizes of a config.json. Torch-free.

What a plan needs of a model are its matrices. Most decoders are Llama's but for what costs next to nothing: another norm,
another scale, a cap on the scores. So the sizes are read under whatever names they have, and what is taken for something
else is said. What is no decoder, or has blocks that are not attention, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from weft.config.load import explain
from weft.models.shape import Shape
from weft.units import short

NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "max_seq": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx"),
}
"""A size, and the keys that it goes by, the usual one first."""
EXPERTS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "per_token": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_top_k", "moe_topk",
        "topk",
    ),
    "ffn": ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size_moe", "intermediate_size"),
    "shared": ("n_shared_experts", "num_shared_experts"),
    "dense_layers": ("first_k_dense_replace", "num_dense_layers"),
}  # fmt: skip
LATENT = {
    "q_rank": "q_lora_rank", "kv_rank": "kv_lora_rank", "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}  # fmt: skip
INSIDE = ("text_config", "llm_config", "language_config", "attn_config", "ffn_config")
"""Parts that the sizes may stand in."""
TIED = ("gemma", "bloom", "opt", "gpt_bigcode", "gpt_neo", "starcoder2", "cohere", "falcon", "mpt")
"""Beginnings of model types whose head is the embedding where the config does not say it."""
GATED = ("silu", "swish", "swiglu", "geglu")
OTHER_TYPES = ("linear", "mamba", "conv", "recurrent", "delta", "rwkv", "gla", "gsa", "hgrn", "samba", "retnet")
OTHER_KEYS = (
    "mamba", "ssm", "conv_kernel", "conv_size", "linear_att", "linear_conv", "state_size", "recurrent", "block_configs",
    "hybrid_override_pattern",
)  # fmt: skip
"""In words of model types and layers, and in names of keys: not all blocks are attention and an MLP of the same sizes."""
EVERY = (
    "interleave_moe_layer_step",
    "decoder_sparse_step",
    "moe_layer_interval",
    "moe_layer_freq",
    "expert_layer_period",
)
"""Keys that say which blocks have experts: each, or every second one."""
NO_DECODER = ("type_vocab_size", "num_decoder_layers", "d_kv", "projection_dim", "encoder_layers")
"""Keys of encoders, and of what has one."""


def stand_in(config: Mapping[str, Any]) -> tuple[Shape, list[str]]:
    """Blocks of the same sizes, and what is taken for something else.

    Raises:
        ValueError: a size is missing, or it is no decoder of attention and MLPs.
    """
    whole = dict(config)
    for name in INSIDE:
        whole |= {key: value for key, value in (config.get(name) or {}).items() if value is not None}
    kind = str(whole.get("model_type") or (whole.get("architectures") or ["?"])[0])
    _check(kind, whole)
    sizes = _sizes(whole, NAMES)
    if missing := [NAMES[name][0] for name in ("num_layers", "hidden", "num_heads", "vocab") if name not in sizes]:
        raise ValueError(f"config.json of a {kind}: it lacks {', '.join(missing)}")
    gated, layernorm = _gated(kind, whole), any(key.startswith("layer_norm_eps") for key in whole)
    tree: dict[str, Any] = {"max_seq": 4096, "ffn": 4 * sizes["hidden"], **sizes}
    tree |= {
        "activation": "swiglu" if gated else "gelu", "norm": "layernorm" if layernorm else "rmsnorm",
        "qkv_bias": bool(whole.get("attention_bias") or whole.get("qkv_bias") or whole.get("add_qkv_bias")),
        "qk_norm": bool(whole.get("use_qk_norm") or whole.get("qk_norm")),
        "tied": bool(whole.get("tie_word_embeddings", kind.startswith(TIED))),
    }  # fmt: skip
    if whole.get("multi_query") and "num_kv_heads" not in sizes:
        tree["num_kv_heads"] = 1
    remarks = _windows(whole, tree)
    if _sizes(whole, EXPERTS).get("num_experts", 1) > 1:
        tree |= _mixture(kind, whole, tree["ffn"])
        remarks += [] if gated else ["experts are computed as SwiGLU's"]
    if whole.get("kv_lora_rank"):
        tree["latent"] = {ours: whole.get(theirs) for ours, theirs in LATENT.items()}
        tree |= {"family": "deepseek_v3", "qk_norm": False, "qkv_bias": False}
        for name in ("num_kv_heads", "head_dim"):
            tree.pop(name, None)
    if any(key.startswith(("index_", "sparse_attention")) for key in whole):
        remarks.append("attention looks at all places, not at some that are picked")
    try:
        shape = Shape.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"config.json of a {kind}: {explain(error, Shape)}") from None
    told = f"the plan is of weft's own blocks in its sizes, {short(shape.num_params)} parameters"
    if shape.active_params != shape.num_params:
        told += f", {short(shape.active_params)} of them for a token"
    return shape, [f"{told}: see that this is right", *remarks]


def _check(kind: str, whole: Mapping[str, Any]) -> None:
    """Raises: ValueError: it is no decoder, or not all of its blocks are attention and an MLP."""
    if whole.get("is_encoder_decoder") or any(whole.get(key) for key in NO_DECODER):
        raise ValueError(f"a {kind} is no decoder alone, and weft plans nothing else")
    if any(word in str(whole.get("architectures")).lower() for word in ("eagle", "draft")):
        raise ValueError("it is of a draft for another model")
    layers = sorted({str(layer) for key in ("layer_types", "layers_block_type") for layer in whole.get(key) or ()})
    words = [word for word in (kind, *layers) if any(part.startswith(OTHER_TYPES) for part in word.lower().split("_"))]
    words += [key for key, value in whole.items() if value and any(part in key for part in OTHER_KEYS)]
    if whole.get("q_lora_rank") and not whole.get("kv_lora_rank"):
        words.append("q_lora_rank without kv_lora_rank")
    if words:
        raise ValueError(f"{words[0]}: not all blocks of a {kind} are attention and an MLP as weft has them")


def _sizes(whole: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    found = {}
    for name, keys in names.items():
        value = next((whole[key] for key in keys if type(whole.get(key)) is int and whole[key] > 0), None)
        if value is not None:
            found[name] = value
    return found


def _gated(kind: str, whole: Mapping[str, Any]) -> bool:
    """Whether its MLPs have three matrices."""
    keys = ("hidden_act", "hidden_activation", "activation_function")
    said = [*(whole.get(key) for key in keys), (whole.get("ffn_act_fn") or {}).get("name")]
    usual = "silu" if "rms_norm_eps" in whole else "gelu"
    return kind.startswith("gemma") or next(filter(None, said), usual) in GATED


def _mixture(kind: str, whole: Mapping[str, Any], ffn: int) -> dict[str, Any]:
    """Raises: ValueError: it does not say how many experts a token has, or some blocks in between have none."""
    experts = _sizes(whole, EXPERTS)
    if "per_token" not in experts:
        raise ValueError(f"config.json of a {kind} does not say how many of its experts a token has")
    for key in EVERY:
        every = whole.get(key)
        if isinstance(every, list) and 1 in every:
            experts["dense_layers"] = every.index(1)
            every = len(every) - sum(every) - every.index(1) + 1
        if isinstance(every, int) and every > 1:
            raise ValueError(f"{key}: in a {kind} blocks with experts and without take turns")
    width = whole.get("shared_expert_intermediate_size")
    if width and "shared" not in experts:
        experts["shared"] = max(1, round(width / experts["ffn"]))
    if (dense := whole.get("intermediate_size_mlp")) is not None:  # Llama 4's: all tokens meet another expert
        experts["shared"], ffn = 1, dense
    return {"experts": experts, "activation": "swiglu", "ffn": whole.get("dense_intermediate_size") or ffn}


def _windows(whole: Mapping[str, Any], tree: dict[str, Any]) -> list[str]:
    """A window that all blocks have; where only some have it, none has."""
    window, layers = whole.get("sliding_window"), [str(layer) for layer in whole.get("layer_types") or ()]
    if not window or whole.get("use_sliding_window") is False:
        return []
    some = [layer for layer in layers if "sliding" in layer]
    if len(some) == len(layers) and not whole.get("sliding_window_pattern"):
        tree["sliding_window"] = window
        return []
    return [f"all blocks look at all places, also those that look at {window} of them only"]
