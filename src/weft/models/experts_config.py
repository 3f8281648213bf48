"""The part of a Hugging Face config.json that speaks of experts, both ways. Torch-free."""

from __future__ import annotations

from typing import Any

from weft.models.keys import Keys
from weft.models.shape import Family, Shape


def experts_from_config(family: Family, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of models/shape.py's Experts."""
    keys.seen |= {"output_router_logits", "router_aux_loss_coef"}  # of a loss that is the trainer's to choose
    if family == "mixtral":
        keys.only("router_jitter_noise", 0.0)
        return {
            "num_experts": keys.count("num_local_experts", 8),
            "per_token": keys.count("num_experts_per_tok", 2),
            "ffn": sizes["ffn"],
        }
    keys.only("decoder_sparse_step", 1)
    dense = keys.get("mlp_only_layers", [])
    if dense != list(range(len(dense))):
        raise ValueError(f"config.json: mlp_only_layers is {dense}; weft has the first layers without experts, or none")
    return {
        "num_experts": keys.count("num_local_experts" if "num_local_experts" in keys.config else "num_experts", 128),
        "per_token": keys.count("num_experts_per_tok", 8),
        "ffn": keys.count("moe_intermediate_size", 768),
        "dense_layers": len(dense),
        "norm_topk": keys.flag("norm_topk_prob", False),
    }


def config_from_experts(shape: Shape) -> dict[str, Any]:
    experts = shape.experts
    assert experts is not None
    if shape.family == "mixtral":
        return {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.per_token}
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.ffn,
        "norm_topk_prob": experts.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.dense_layers)),
    }
