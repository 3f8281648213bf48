"""Shape ↔ the config.json of Hugging Face, both ways. Torch-free.

A config is read key by key: one that changes what the model computes, in a way that weft does not, is refused by name.
Both spellings of the rotary settings are read, `rope_theta` with `rope_scaling` and transformers 5's `rope_parameters`;
the older is written, because every version loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from weft.models.places import ARCHITECTURES, Place, check_expressible, places
from weft.models.shape import Family, RopeScaling, Shape

__all__ = ["ARCHITECTURES", "TOKEN_KEYS", "Place", "config_from_shape", "family_of", "places", "shape_from_config"]

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config that belong to the tokenizer: carried along, never interpreted."""

_WITHOUT_EFFECT = (
    # where the config comes from, and the numbers' type
    "architectures model_type transformers_version _name_or_path _commit_hash torch_dtype dtype tokenizer_class "
    # of training, of other heads, and of how the outputs are packed
    "attention_dropout resid_pdrop embd_pdrop attn_pdrop gradient_checkpointing use_cache return_dict torchscript "
    "output_hidden_states output_attentions id2label label2id num_labels problem_type finetuning_task n_ctx "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout use_bfloat16 "
    "task_specific_params tf_legacy_loss pretraining_tp output_past n_special predict_special_tokens is_llama_config "
    "transformers.js_config "
    # how transformers runs it: the same function, other kernels
    "attn_implementation _attn_implementation _attn_implementation_autoset chunk_size_feed_forward "
    # of generation, that older versions keep in the model's config
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens prefix sep_token_id decoder_start_token_id"
)

_ONLY: dict[str, Any] = {
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
    "pruned_heads": {}, "is_causal": True, "use_mrope": False, "rope_interleaved": False, "partial_rotary_factor": 1.0, "per_layer_config": {},
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
}  # fmt: skip
"""Keys that may have one value: with another, the model is a different function."""


class _Keys:
    """A config, and which of its keys have been understood."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.seen = config, {*TOKEN_KEYS, *_WITHOUT_EFFECT.split()}

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"config.json lacks {key!r}")
        return value

    def only(self, key: str, *values: Any) -> None:
        """Absent, or one of `values`."""
        value = self.get(key, values[0])
        if value not in values:
            known = " or ".join(repr(value) for value in values)
            raise ValueError(f"config.json: {key} is {value!r}; weft computes only {known}")

    def finish(self) -> None:
        for key, value in _ONLY.items():
            self.only(key, value)
        unknown = sorted(key for key, value in self.config.items() if key not in self.seen and value is not None)
        if unknown:
            raise ValueError(
                f"config.json: {', '.join(unknown)}: weft does not know what this does to the model, so it does not "
                "guess; take it out if it changes nothing"
            )


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        ValueError: something there that weft does not implement, or that is missing; names the key.
    """
    family, keys = family_of(config), _Keys(config)
    sizes = _gpt2_shape(keys) if family == "gpt2" else _llama_shape(family, keys)
    keys.finish()
    try:
        return Shape(family=family, **sizes)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"config.json describes no model that weft knows: {what}") from error


def family_of(config: Mapping[str, Any]) -> Family:
    """The family by `architectures`, or, where that is left out, by `model_type`."""
    if config.get("auto_map"):
        raise ValueError("config.json: auto_map asks to run code that comes with the weights; weft never does")
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
        raise ValueError(f"config.json: {what}; weft knows {', '.join(families)}")
    if config.get("model_type", family) != family:
        raise ValueError(f"config.json: model_type is {config['model_type']!r}, which is not that of {named[0]}")
    return family


def _gpt2_shape(keys: _Keys) -> dict[str, Any]:
    keys.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    hidden, heads = keys.get("n_embd", 768), keys.get("n_head", 12)
    return {
        "num_layers": keys.get("n_layer", 12),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _divided("n_embd", hidden, "n_head", heads),
        "ffn": keys.get("n_inner", 4 * hidden),
        "vocab": keys.get("vocab_size", 50257),
        "max_seq": keys.get("n_positions", 1024),
        "norm_eps": keys.get("layer_norm_epsilon", 1e-5),
        "tied": keys.get("tie_word_embeddings", True),
        "init_std": keys.get("initializer_range", 0.02),
    }


def _llama_shape(family: Family, keys: _Keys) -> dict[str, Any]:
    keys.only("hidden_act", "silu")
    hidden, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    theta, scaling = _rope(keys)
    head_dim = keys.get("head_dim", 128 if family == "qwen3" else None)
    if head_dim is None:
        head_dim = _divided("hidden_size", hidden, "num_attention_heads", heads)
    if family == "qwen2" and head_dim * heads != hidden:
        raise ValueError(f"config.json: head_dim is {head_dim}; in Qwen2 it is hidden_size over num_attention_heads")
    sizes = {
        "num_layers": keys.need("num_hidden_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": keys.get("num_key_value_heads", 8 if family == "mistral" else heads),
        "head_dim": head_dim,
        "ffn": keys.need("intermediate_size"),
        "vocab": keys.need("vocab_size"),
        "max_seq": keys.need("max_position_embeddings"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": keys.get("rms_norm_eps", 1e-6),
        "tied": keys.get("tie_word_embeddings", False),
        "init_std": keys.get("initializer_range", 0.02),
        "sliding_window": _window(family, keys),
    }
    if family == "llama":
        bias = keys.get("attention_bias", False)
        if keys.get("mlp_bias", False) != bias:
            raise ValueError(
                f"config.json: attention_bias is {bias} and mlp_bias is {not bias}; weft has both or neither"
            )
        sizes |= {"qkv_bias": bias, "out_bias": bias}
    elif family == "qwen3":
        keys.only("attention_bias", False)
    return sizes


def _divided(whole: str, size: int, part: str, count: int) -> int:
    if not isinstance(size, int) or not isinstance(count, int) or count < 1 or size % count:
        raise ValueError(f"config.json: {part} ({count}) does not divide {whole} ({size})")
    return size // count


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from either spelling; where both are there, they must agree."""
    top = keys.get("rope_theta")
    spellings = {name: keys.get(name) for name in ("rope_scaling", "rope_parameters")}
    found = {_rope_table(name, table, top) for name, table in spellings.items() if table}
    if len(found) > 1:
        raise ValueError("config.json: rope_scaling (with rope_theta) and rope_parameters disagree")
    return found.pop() if found else (float(top or 10_000.0), None)


def _rope_table(name: str, table: Any, top: float | None) -> tuple[float, RopeScaling | None]:
    if not isinstance(table, Mapping):
        raise ValueError(f"config.json: {name} is {table!r}; it must be a table of settings, or null")
    rope = dict(table)
    theta = rope.pop("rope_theta", None) or top or 10_000.0
    if top is not None and top != theta:
        raise ValueError(f"config.json: rope_theta is {top}, and {theta} in {name}")
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    if rope.pop("type", kind) != kind:
        raise ValueError(f"config.json: {name} names two types")
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError(f"config.json: {name}.partial_rotary_factor: weft turns whole heads")
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: {name}.rope_type is {kind!r}; weft computes 'default' and 'llama3'")
    factors = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    needed = factors if kind == "llama3" else set()
    if unknown := sorted(rope.keys() - needed):
        raise ValueError(f"config.json: {name}.{unknown[0]} means nothing to weft where rope_type is {kind!r}")
    if missing := sorted(needed - rope.keys()):
        raise ValueError(f"config.json: {name}.{missing[0]} is missing; rope_type 'llama3' needs it")
    if kind == "default":
        return float(theta), None
    rope["original_max_seq"] = rope.pop("original_max_position_embeddings")
    return float(theta), RopeScaling.model_validate(rope)


def _window(family: Family, keys: _Keys) -> int | None:
    """The sliding window of all layers. What only some layers have is refused."""
    if family == "llama":
        return None  # a window there is a key unknown to the architecture, refused with the others
    keys.seen |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    window: int | None = keys.config.get("sliding_window", 4096)  # null means none; left out means 4096
    first = 0
    if family != "mistral":
        window = window if keys.get("use_sliding_window", False) else None
        first = keys.get("max_window_layers", 28)
    num_layers = keys.need("num_hidden_layers")
    default = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    types = keys.get("layer_types", default)
    if set(types) == {"full_attention"} and (types == default or family != "mistral"):
        return None
    if set(types) == {"sliding_attention"} and window is not None:
        return window
    raise ValueError(
        f"config.json: sliding_window is {window}, max_window_layers {first} and layer_types {sorted(set(types))}: "
        "weft slides the window of all layers or of none"
    )


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
        "rope_scaling": None,
        "attention_dropout": 0.0,
    }
    if shape.family != "qwen2":
        config["head_dim"] = shape.head_dim
    if shape.family == "llama":
        config |= {"attention_bias": shape.qkv_bias, "mlp_bias": shape.out_bias}
    if shape.family == "qwen3":
        config["attention_bias"] = False
    if shape.family == "mistral":
        config["sliding_window"] = shape.sliding_window
    if shape.family in ("qwen2", "qwen3"):
        slides = shape.sliding_window is not None
        config |= {
            "use_sliding_window": slides,
            "sliding_window": shape.sliding_window,
            "max_window_layers": 0 if slides else shape.num_layers,
        }
    if shape.rope_scaling is not None:
        scaling = shape.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq,
        }
    return config
