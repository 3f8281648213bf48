"""Where each weft parameter lies in the tensors of a Hugging Face directory. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.models.parameters import stored_sizes
from weft.models.shape import Family, Shape

ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""What each family is called there."""
LATENT_FAMILIES: tuple[Family, ...] = ("deepseek_v2", "deepseek_v3")
EXPERT_FAMILIES: tuple[Family, ...] = ("mixtral", "qwen3_moe", *LATENT_FAMILIES)
SELECTION_BIAS = ".mlp.gate.e_score_correction_bias"
"""What a router's bias is called there."""


def check_expressible(shape: Shape) -> None:
    """Each family's architecture there has one value of most switches.

    Raises:
        ValueError: the shape has another; names the field.
    """
    gpt2, family = shape.family == "gpt2", shape.family
    both = shape.qkv_bias and shape.out_bias  # Llama has all its biases or none
    whole_heads = gpt2 or family == "qwen2"
    must: dict[str, tuple[Any, Any]] = {
        "positions": (shape.positions, "learned" if gpt2 else "rotary"),
        "norm": (shape.norm, "layernorm" if gpt2 else "rmsnorm"),
        "activation": (shape.activation, "gelu" if gpt2 else "swiglu"),
        "qk_norm": (shape.qk_norm, family in ("qwen3", "qwen3_moe")),
        "out_bias": (shape.out_bias, both if family == "llama" else gpt2),
        "qkv_bias": (shape.qkv_bias, both if family == "llama" else family in ("gpt2", "qwen2")),
        "num_kv_heads": (shape.num_kv_heads, shape.num_heads if gpt2 else shape.num_kv_heads),
        "head_dim times num_heads": (
            shape.head_dim * shape.num_heads, shape.hidden if whole_heads else shape.head_dim * shape.num_heads
        ),
        "hidden modulo num_heads": (shape.hidden % shape.num_heads if family in ("llama", "deepseek_v2") else 0, 0),
        "sliding_window": (
            shape.sliding_window, None if family in ("gpt2", "llama", *LATENT_FAMILIES) else shape.sliding_window
        ),
        "rope_scaling": (shape.rope_scaling, None if gpt2 or family in LATENT_FAMILIES else shape.rope_scaling),
        "yarn": (shape.yarn, shape.yarn if family in LATENT_FAMILIES else None),
        "latent": ("given" if shape.latent else "left out", "given" if family in LATENT_FAMILIES else "left out"),
        **_experts_must(shape),
    }  # fmt: skip
    for field, (is_, wanted) in must.items():
        if is_ != wanted:
            raise ValueError(
                f"model.{field} is {is_}, but {ARCHITECTURES[family]}, as whose weights this family is written, "
                f"has {wanted}; change it, or model.family"
            )


def _experts_must(shape: Shape) -> dict[str, tuple[Any, Any]]:
    """The same of experts: what the field is, and what the family's architecture has."""
    experts, family = shape.experts, shape.family
    wanted = family in EXPERT_FAMILIES
    must: dict[str, tuple[Any, Any]] = {
        "experts": ("given" if experts else "left out", "given" if wanted else "left out")
    }
    if experts is not None and family == "mixtral":
        must |= {
            "experts.ffn": (experts.ffn, shape.ffn),
            "experts.dense_layers": (experts.dense_layers, 0),
            "experts.norm_topk": (experts.norm_topk, True),
        }
    if experts is not None and family == "deepseek_v2":
        must["experts.norm_topk"] = (experts.norm_topk, False)
    if experts is not None:
        deepseek, v3 = family in LATENT_FAMILIES, family == "deepseek_v3"
        must |= {
            "experts.scores": (experts.scores, "sigmoid" if v3 else "softmax"),
            "experts.shared": (experts.shared, max(1, experts.shared) if deepseek else 0),
            "experts.groups": (experts.groups, experts.groups if deepseek else 1),
            "experts.scaling": (experts.scaling, experts.scaling if deepseek else 1.0),
        }
    return must


@dataclass(frozen=True)
class Place:
    """Where one weft parameter lies in the tensors of the Hugging Face directory.

    Attributes:
        tensor: its name there.
        sizes: that tensor's dims.
        weft_sizes: the parameter's own.
        transposed: the tensor is [in, out], weft's parameter [out, in] (GPT-2's Conv1D), or the other way round (the
            last matrix of an expert).
        dim: the tensor's dim along which several parameters lie side by side (GPT-2's q, k, v).
        offset: where along `dim` this parameter begins.
    """

    tensor: str
    sizes: tuple[int, ...]
    weft_sizes: tuple[int, ...]
    transposed: bool = False
    dim: int = 0
    offset: int = 0

    def box(self, start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A box of the weft parameter, as a box of the tensor."""
        starts, stops = (list(reversed(edge)) if self.transposed else list(edge) for edge in (start, stop))
        starts[self.dim] += self.offset
        stops[self.dim] += self.offset
        return tuple(starts), tuple(stops)


def places(shape: Shape) -> dict[str, Place]:
    """Weft name → place, of everything that is stored of the whole model. A tied head has none: it is `embed.weight`."""
    check_expressible(shape)
    names, place = (_GPT2_NAMES, _gpt2_place) if shape.family == "gpt2" else (_LLAMA_NAMES, _llama_place)
    if shape.family == "mixtral":
        names = _MIXTRAL_NAMES
    if shape.latent is not None:
        names = _LATENT_NAMES | ({"attention.q": "self_attn.q_b_proj"} if shape.latent.q_rank else {})
    return {name: place(_rename(name, names), sizes) for name, sizes in stored_sizes(shape).items()}


_GPT2_NAMES = {
    "embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
    "blocks": "transformer.h", "attention_norm": "ln_1", "mlp_norm": "ln_2",
    "attention.q": "attn.c_attn.0", "attention.k": "attn.c_attn.1", "attention.v": "attn.c_attn.2",
    "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks": "model.layers", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    "mlp.router": "mlp.gate", "mlp.experts": "mlp.experts",
    "experts.gate": "gate_proj", "experts.up": "up_proj", "experts.down": "down_proj",
    "mlp.shared.gate": "mlp.shared_experts.gate_proj", "mlp.shared.up": "mlp.shared_experts.up_proj",
    "mlp.shared.down": "mlp.shared_experts.down_proj",
}  # fmt: skip

_MIXTRAL_NAMES = _LLAMA_NAMES | {
    "mlp.router": "block_sparse_moe.gate", "mlp.experts": "block_sparse_moe.experts",
    "experts.gate": "w1", "experts.up": "w3", "experts.down": "w2",
}  # fmt: skip
_LATENT_NAMES = _LLAMA_NAMES | {
    "attention.q_down": "self_attn.q_a_proj", "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa", "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv": "self_attn.kv_b_proj",
}  # fmt: skip


def _rename(name: str, names: dict[str, str]) -> str:
    """blocks.3.attention.q.weight → model.layers.3.self_attn.q_proj.weight"""
    module, _, leaf = name.rpartition(".")
    if module.startswith("blocks."):
        blocks, index, module = module.split(".", 2)
        if (module, leaf) == ("mlp.router", "bias"):
            return f"{names[blocks]}.{index}{SELECTION_BIAS}"
        return f"{names[blocks]}.{index}.{_rename_module(module, names)}.{leaf}"
    return f"{names[module]}.{leaf}"


def _rename_module(module: str, names: dict[str, str]) -> str:
    if not module.startswith("mlp.experts."):
        return names[module]
    experts, expert, matrix = module.rsplit(".", 2)
    return f"{names[experts]}.{expert}.{names[f'experts.{matrix}']}"


def _llama_place(tensor: str, sizes: tuple[int, ...]) -> Place:
    last_of_expert = ".experts." in tensor and tensor.endswith((".w2.weight", ".down_proj.weight"))
    return Place(tensor, sizes[::-1], sizes, transposed=True) if last_of_expert else Place(tensor, sizes, sizes)


def _gpt2_place(tensor: str, weft_sizes: tuple[int, ...]) -> Place:
    module, _, leaf = tensor.rpartition(".")
    transposed = ".h." in tensor and leaf == "weight" and len(weft_sizes) == 2  # the Conv1Ds
    sizes = weft_sizes[::-1] if transposed else weft_sizes
    if not module[:-2].endswith("attn.c_attn"):
        return Place(tensor, sizes, weft_sizes, transposed)
    whole, index, out = module[:-2], int(module[-1]), sizes[-1]
    return Place(f"{whole}.{leaf}", (*sizes[:-1], 3 * out), weft_sizes, transposed, len(sizes) - 1, index * out)
