"""The keys of a Hugging Face config.json: each must be understood, or be known to have no effect. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config that belong to the tokenizer: carried along, never interpreted."""

_WITHOUT_EFFECT = (
    # where the config comes from, and the numbers' type
    "architectures model_type transformers_version _name_or_path _commit_hash torch_dtype dtype tokenizer_class "
    # of training, of other heads, and of how the outputs are packed
    "attention_dropout resid_pdrop embd_pdrop attn_pdrop gradient_checkpointing use_cache return_dict torchscript "
    "output_hidden_states output_attentions id2label label2id num_labels problem_type finetuning_task n_ctx "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout use_bfloat16 "
    "task_specific_params tf_legacy_loss pretraining_tp "
    # left over from old versions, or for another program
    "output_past n_special predict_special_tokens is_llama_config transformers.js_config "
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
    "pruned_heads": {}, "is_causal": True, "use_mrope": False, "rope_interleaved": False,
    "partial_rotary_factor": 1.0, "per_layer_config": {},
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
}  # fmt: skip
"""Keys that may have one value: with another, the model is a different function."""


class Keys:
    """A config, and which of its keys have been understood."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.seen = config, {*TOKEN_KEYS, *_WITHOUT_EFFECT.split()}

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; required where there is no default."""
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"config.json lacks {key!r}")
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number, at least 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise ValueError(f"config.json: {key} is {value!r}; it must be true or false")
        return value

    def number(self, key: str, default: float) -> float:
        return number(key, self.get(key, default))

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


def whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number, not below 0")
    return value


def number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"config.json: {key} is {value!r}; it must be a number above 0")
    return float(value)
