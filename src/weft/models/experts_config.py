"""The part of a Hugging Face config.json that speaks of experts, both ways. Torch-free."""

from __future__ import annotations

from typing import Any

from weft.models.keys import Keys, whole
from weft.models.places import LATENT_FAMILIES
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
    if family in LATENT_FAMILIES:
        return _deepseek_experts(family, keys)
    keys.only("decoder_sparse_step", 1)
    keys.only("shared_expert_intermediate_size", 0)  # as Qwen3-Coder's says, like the next two
    keys.only("qkv_bias", False)
    keys.only("use_qk_norm", True)
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


def _deepseek_experts(family: Family, keys: Keys) -> dict[str, Any]:
    v3 = family == "deepseek_v3"
    # of the published programs: how they run, and losses
    keys.seen |= {"ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers"}
    keys.only("moe_layer_freq", 1)
    keys.only("scoring_func", "sigmoid" if v3 else "softmax")
    methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    keys.only("topk_method", *methods)
    keys.seen |= {"n_group", "topk_group"}
    grouped = v3 or keys.config.get("topk_method") == "group_limited_greedy"
    if not v3:
        keys.only("norm_topk_prob", False)  # transformers computes no other
    return {
        "num_experts": keys.count("n_routed_experts", 256 if v3 else 64),
        "per_token": keys.count("num_experts_per_tok", 8 if v3 else None),
        "ffn": keys.count("moe_intermediate_size", 2048 if v3 else 1407),
        "dense_layers": whole("first_k_dense_replace", keys.get("first_k_dense_replace", 3 if v3 else 0)),
        "norm_topk": v3 and keys.flag("norm_topk_prob", True),
        "shared": keys.count("n_shared_experts", 1 if v3 else 2),
        "scores": "sigmoid" if v3 else "softmax",
        "groups": keys.count("n_group", 8 if v3 else None) if grouped else 1,
        "top_groups": keys.count("topk_group", 4 if v3 else None) if grouped else 1,
        "scaling": keys.number("routed_scaling_factor", 2.5 if v3 else 1.0),
    }


def config_from_experts(shape: Shape) -> dict[str, Any]:
    experts = shape.experts
    assert experts is not None
    if shape.family == "mixtral":
        return {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.per_token}
    if shape.family in LATENT_FAMILIES:
        v3 = shape.family == "deepseek_v3"
        return {
            "n_routed_experts": experts.num_experts,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.ffn,
            "first_k_dense_replace": experts.dense_layers,
            "moe_layer_freq": 1,
            "norm_topk_prob": experts.norm_topk,
            "n_shared_experts": experts.shared,
            "scoring_func": experts.scores,
            "topk_method": "noaux_tc" if v3 else "greedy" if experts.groups == 1 else "group_limited_greedy",
            "n_group": experts.groups,
            "topk_group": experts.top_groups,
            "routed_scaling_factor": experts.scaling,
        } | ({"num_nextn_predict_layers": 0} if v3 else {})  # fmt: skip
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.ffn,
        "norm_topk_prob": experts.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.dense_layers)),
    }
