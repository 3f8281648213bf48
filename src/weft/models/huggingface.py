"""Shape ↔ the config.json of Hugging Face, both ways. Torch-free.

A config is read key by key: one that changes what the model computes, in a way that weft does not, is refused by name.
Both spellings of the rotary settings are read, `rope_theta` with `rope_scaling` and transformers 5's `rope_parameters`;
the older is written, because every version loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from weft.models.experts_config import config_from_experts, experts_from_config
from weft.models.keys import TOKEN_KEYS, Keys
from weft.models.places import ARCHITECTURES, EXPERT_FAMILIES, LATENT_FAMILIES, Place, check_expressible, places
from weft.models.rope_config import config_from_rope, rope_from_config
from weft.models.shape import Family, Shape

__all__ = ["ARCHITECTURES", "TOKEN_KEYS", "Place", "config_from_shape", "family_of", "places", "shape_from_config"]


KV_HEADS: dict[Family, int] = {"mistral": 8, "mixtral": 8, "qwen3_moe": 4}
"""Where a config leaves them out."""


ALSO = {"deepseek_v3": "kimi_k2"}
"""Another model_type of the same architecture, family by family."""


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        ValueError: something there that weft does not implement, or that is missing; names the key.
    """
    family, keys = family_of(config), Keys(config)
    sizes = _gpt2_shape(keys) if family == "gpt2" else _llama_shape(family, keys)
    keys.finish()
    try:
        return Shape(family=family, **sizes)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"config.json describes no model that weft knows: {what}") from error


def family_of(config: Mapping[str, Any]) -> Family:
    """The family by `architectures`, or, where that is left out, by `model_type`."""
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config: weft reads unquantized weights only")
    families = {architecture: family for family, architecture in ARCHITECTURES.items()}
    named = config.get("architectures") or []
    family: Family | None
    if named:
        family = families.get(named[0]) if isinstance(named, list) and len(named) == 1 else None
    else:
        family = next((family for family in ARCHITECTURES if family == config.get("model_type")), None)
    if family is None:
        what = f"architectures is {named!r}" if named else f"model_type is {config.get('model_type')!r}"
        inside = ". Its text_config alone may be one of them, as a file of its own" if config.get("text_config") else ""
        raise ValueError(f"config.json: {what}; weft knows {', '.join(families)}{inside}")
    if config.get("auto_map") and family not in LATENT_FAMILIES:  # whose code transformers has taken over since
        raise ValueError("config.json: auto_map asks to run code that comes with the weights; weft never does")
    if config.get("model_type", family) not in (family, ALSO.get(family)):
        raise ValueError(f"config.json: model_type is {config['model_type']!r}, which is not that of {named[0]}")
    return family


def _gpt2_shape(keys: Keys) -> dict[str, Any]:
    keys.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    hidden, heads = keys.count("n_embd", 768), keys.count("n_head", 12)
    return {
        "num_layers": keys.count("n_layer", 12),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _divided("n_embd", hidden, "n_head", heads),
        "ffn": keys.count("n_inner", 4 * hidden),
        "vocab": keys.count("vocab_size", 50257),
        "max_seq": keys.count("n_positions", 1024),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "tied": keys.flag("tie_word_embeddings", True),
        "init_std": keys.number("initializer_range", 0.02),
    }


def _llama_shape(family: Family, keys: Keys) -> dict[str, Any]:
    keys.only("hidden_act", "silu")
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    theta, scaling = rope_from_config(keys, 1_000_000.0 if family == "mixtral" else 10_000.0)
    latent = _latent(family, keys) if family in LATENT_FAMILIES else None
    if latent is not None:
        head_dim = latent["nope_dim"] + latent["rope_dim"]
    elif keys.get("head_dim") is None and family != "qwen3":
        head_dim = _divided("hidden_size", hidden, "num_attention_heads", heads)
    else:
        head_dim = keys.count("head_dim", 128)
    if family == "qwen2" and head_dim * heads != hidden:
        raise ValueError(f"config.json: head_dim is {head_dim}; in Qwen2 it is hidden_size over num_attention_heads")
    sizes: dict[str, Any] = {
        "num_layers": keys.count("num_hidden_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": keys.count("num_key_value_heads", KV_HEADS.get(family, heads)),
        "head_dim": head_dim,
        "ffn": keys.count("intermediate_size"),
        "vocab": keys.count("vocab_size"),
        "max_seq": keys.count("max_position_embeddings"),
        "rope_theta": theta,
        **scaling,
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tied": keys.flag("tie_word_embeddings", False),
        "init_std": keys.number("initializer_range", 0.02),
        "sliding_window": _window(family, keys),
    }
    if family in EXPERT_FAMILIES:
        sizes["experts"] = experts_from_config(family, keys, sizes)
    if latent is not None:
        sizes["latent"] = latent
    if family == "llama":
        bias = keys.flag("attention_bias", False)
        if keys.flag("mlp_bias", False) != bias:
            raise ValueError(
                f"config.json: attention_bias is {bias} and mlp_bias is {not bias}; weft has both or neither"
            )
        sizes |= {"qkv_bias": bias, "out_bias": bias}
    else:
        keys.only("attention_bias", family == "qwen2")  # Qwen2 has it whether or not the config says so
        keys.only("mlp_bias", False)
    return sizes


def _latent(family: Family, keys: Keys) -> dict[str, Any]:
    """The fields of models/shape.py's Latent. A q_lora_rank of null is none; left out, it is 1536."""
    keys.seen |= {"q_lora_rank", "auto_map"}
    none = keys.config.get("q_lora_rank", 1536) is None
    nope, rope = keys.count("qk_nope_head_dim", 128), keys.count("qk_rope_head_dim", 64)
    keys.only("head_dim", rope)  # as transformers says it
    keys.only("qk_head_dim", nope + rope)
    keys.only("rope_interleave", True)
    return {
        "q_rank": None if none else keys.count("q_lora_rank", 1536),
        "kv_rank": keys.count("kv_lora_rank", 512),
        "nope_dim": nope,
        "rope_dim": rope,
        "value_dim": keys.count("v_head_dim", 128),
    }


def _divided(whole: str, size: int, part: str, count: int) -> int:
    if size % count:
        raise ValueError(f"config.json: {part} ({count}) does not divide {whole} ({size})")
    return size // count


def _window(family: Family, keys: Keys) -> int | None:
    """The sliding window of all layers. What only some layers have is refused."""
    if family in EXPERT_FAMILIES:
        return _whole_window(family, keys)
    if family == "llama":
        return None  # a window there is a key unknown to the architecture, refused with the others
    keys.seen |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    # null means none; left out means 4096
    window = None if keys.config.get("sliding_window", 4096) is None else keys.count("sliding_window", 4096)
    first = 0
    if family != "mistral":
        window = window if keys.flag("use_sliding_window", False) else None
        first = keys.get("max_window_layers", 28)
        if type(first) is not int:
            raise ValueError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
    num_layers = keys.count("num_hidden_layers")
    default = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    types = keys.get("layer_types", default)
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types) or len(types) != num_layers:
        raise ValueError(f"config.json: layer_types must be a list of {num_layers} names, one for each layer")
    if set(types) == {"full_attention"} and (types == default or family != "mistral"):
        return None
    if set(types) == {"sliding_attention"} and window is not None:
        return window
    raise ValueError(
        f"config.json: sliding_window is {window}, max_window_layers {first} and layer_types {sorted(set(types))}: "
        "weft slides the window of all layers or of none"
    )


def _whole_window(family: Family, keys: Keys) -> int | None:
    """Of the architectures that have one for all layers."""
    if family in LATENT_FAMILIES:
        return None
    if family == "mixtral":
        return keys.count("sliding_window") if keys.get("sliding_window") is not None else None
    keys.seen |= {"sliding_window", "max_window_layers"}
    if not keys.flag("use_sliding_window", False):
        return None
    keys.only("max_window_layers", 0)  # which transformers passes over, and others do not
    return keys.count("sliding_window", 4096)


def config_from_shape(shape: Shape, dtype: str = "float32", tokens: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a shape, for every version of transformers that knows the architecture.

    Args:
        dtype: of the weights beside it, by torch's name.
        tokens: the values of TOKEN_KEYS. The others are written as null: an architecture's own defaults belong to one
            tokenizer, and would end texts at the wrong token.

    Raises:
        ValueError: this family's architecture there cannot have this shape; names the field.
    """
    check_expressible(shape)
    common: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
    } | {key: (tokens or {}).get(key) for key in TOKEN_KEYS}
    return common | (_gpt2_config(shape) if shape.family == "gpt2" else _llama_config(shape))


def _gpt2_config(shape: Shape) -> dict[str, Any]:
    return {
        "n_layer": shape.num_layers,
        "n_embd": shape.hidden,
        "n_head": shape.num_heads,
        "n_inner": None if shape.ffn == 4 * shape.hidden else shape.ffn,
        "n_positions": shape.max_seq,
        "n_ctx": shape.max_seq,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama_config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_seq,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": config_from_rope(shape),
        "attention_dropout": 0.0,
    }
    if shape.latent is not None:
        config |= {
            "attention_bias": False,
            "q_lora_rank": shape.latent.q_rank,
            "kv_lora_rank": shape.latent.kv_rank,
            "qk_nope_head_dim": shape.latent.nope_dim,
            "qk_rope_head_dim": shape.latent.rope_dim,
            "v_head_dim": shape.latent.value_dim,
        }
    elif shape.family != "qwen2":
        config["head_dim"] = shape.head_dim
    if shape.family == "llama":
        config |= {"attention_bias": shape.qkv_bias, "mlp_bias": shape.out_bias}
    if shape.family in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if shape.experts is not None:
        config |= config_from_experts(shape)
    if shape.family in ("mistral", "mixtral"):
        config["sliding_window"] = shape.sliding_window
    if shape.family in ("qwen2", "qwen3", "qwen3_moe"):
        slides = shape.sliding_window is not None
        config |= {
            "use_sliding_window": slides,
            "sliding_window": shape.sliding_window,
            "max_window_layers": 0 if slides else shape.num_layers,
        }
    return config
