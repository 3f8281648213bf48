"""Experts and latent attention as arguments of Megatron-LM, and back. Torch-free.

Names and meanings: megatron/core/transformer/transformer_config.py and moe/moe_utils.py, August 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from weft.models.shape import Experts, Shape
from weft.models.stretch import Yarn
from weft.plan.emit.shell import Options, one

LATENT = {
    "--q-lora-rank": "q_rank",
    "--kv-lora-rank": "kv_rank",
    "--qk-head-dim": "nope_dim",
    "--qk-pos-emb-head-dim": "rope_dim",
    "--v-head-dim": "value_dim",
}
ROUTING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--moe-router-num-groups": ("groups", int),
    "--moe-router-group-topk": ("top_groups", int),
    "--moe-router-topk-scaling-factor": ("scaling", float),
    "--moe-router-score-function": ("scores", str),
}
"""Argument ↔ setting of model.experts; it is left out where the setting is weft's default."""
ORIGINAL = 4096
"""Positions before the stretch: no argument says them, and this is what Megatron's MLATransformerConfig has."""


def refused(shape: Shape) -> dict[str, bool]:
    """Why Megatron-LM has no such model → whether that is so."""
    yarn = shape.yarn
    return {
        "model.yarn: it stretches the positions of latent attention only": yarn is not None and shape.latent is None,
        f"model.yarn: it stretches {ORIGINAL} positions, and has beta_fast 32 and beta_slow 1": yarn is not None
        and (yarn.original_max_seq, yarn.beta_fast, yarn.beta_slow) != (ORIGINAL, 32, 1),
        "model.experts.norm_topk = false with sigmoid scores: its own add up to 1": shape.experts is not None
        and shape.experts.has_bias
        and not shape.experts.norm_topk,
    }


def arguments(shape: Shape) -> Iterator[str]:
    if shape.latent is not None:
        yield "--multi-latent-attention"
        values = {name: getattr(shape.latent, field) for name, field in LATENT.items()}
        yield from (f"{name} {value}" for name, value in values.items() if value is not None)
        yield "--qk-layernorm"  # of the latent vectors, which weft always has
        if shape.yarn is not None:
            yarn = shape.yarn
            yield "--rope-type yarn"
            yield f"--rotary-scaling-factor {yarn.factor} --mscale {yarn.mscale} --mscale-all-dim {yarn.mscale_all_dim}"
        else:
            yield "--rope-type rope"
    if shape.experts is None:
        return
    experts, usual = shape.experts, Experts(num_experts=1, per_token=1, ffn=1)
    yield "--moe-router-dtype fp32"
    for name, (field, _) in ROUTING.items():
        if (value := getattr(experts, field)) != getattr(usual, field):
            yield f"{name} {value}"
    if experts.has_bias:
        yield "--moe-router-enable-expert-bias"
    elif not experts.norm_topk:
        yield "--moe-router-pre-softmax"
    if experts.shared:
        yield f"--moe-shared-expert-intermediate-size {shape.shared_ffn}"
    if experts.dense_layers:
        yield f"--moe-layer-freq '[0]*{experts.dense_layers}+[1]*{shape.num_layers - experts.dense_layers}'"


def take(there: Options, model: dict[str, Any]) -> None:
    """Move what is known from the arguments into the settings.

    Raises:
        ValueError: weft has no such model; names the argument.
    """
    if there.pop("--multi-latent-attention", None) is not None:
        _take_latent(there, model)
    if not model.get("experts"):
        return
    experts: dict[str, Any] = model["experts"]
    experts.setdefault("ffn", model.get("ffn"))
    experts.setdefault("per_token", 2)  # Megatron's own
    if there.get("--moe-router-dtype") == ["fp32"]:  # as weft's
        del there["--moe-router-dtype"]
    for name, (field, kind) in ROUTING.items():
        if name in there:
            experts[field] = one(there, name, kind)
    before = there.pop("--moe-router-pre-softmax", None) is not None
    if experts.get("scores") == "sigmoid":
        there.pop("--moe-router-enable-expert-bias", None)
    elif before:
        experts["norm_topk"] = False
    if "--moe-shared-expert-intermediate-size" in there:
        width = one(there, "--moe-shared-expert-intermediate-size", int)
        if not experts["ffn"] or width % experts["ffn"]:
            raise ValueError(
                f"--moe-shared-expert-intermediate-size {width}: weft's is a multiple of an expert's {experts['ffn']}"
            )
        experts["shared"] = width // experts["ffn"]
    if "--moe-layer-freq" in there:
        text = "".join(there.pop("--moe-layer-freq"))
        kinds = _kinds(text)
        experts["dense_layers"] = kinds.find("1")
        if "0" in kinds[kinds.find("1") :] or "1" not in kinds:
            raise ValueError(
                f"--moe-layer-freq {text}: weft's blocks without experts are the first, as in [0]*3+[1]*58"
            )


def _kinds(text: str) -> str:
    """Of each block 1, where it has experts, or 0: of `[0]*3+[1]*58`, or of the 1 that all of them are."""
    if text == "1":
        return text
    part = r"\[([01](?:,[01])*)\](?:\*(\d+))?"
    plain = re.sub(r"[\s\"'()]", "", text)
    if not re.fullmatch(rf"{part}(?:\+{part})*", plain):
        return ""
    return "".join(kinds.replace(",", "") * int(times or 1) for kinds, times in re.findall(part, plain))


def _take_latent(there: Options, model: dict[str, Any]) -> None:
    latent = {field: one(there, name, int) for name, field in LATENT.items() if name in there}
    model["latent"] = {"kv_rank": 32, "nope_dim": 128, "rope_dim": 64, "value_dim": 128} | latent  # Megatron's defaults
    for name in ("head_dim", "num_kv_heads"):
        model.pop(name, None)  # they follow from it
    model["qk_norm"] = False
    model.pop("rope_scaling", None)  # which Megatron has for other attention only
    kind = there.pop("--rope-type", ["yarn"])
    numbers = {
        field: one(there, name, float)
        for name, field in (
            ("--rotary-scaling-factor", "factor"),
            ("--mscale", "mscale"),
            ("--mscale-all-dim", "mscale_all_dim"),
        )
        if name in there
    }
    if kind == ["yarn"] and numbers.get("factor", 1) > 1:
        if not numbers.get("mscale_all_dim"):
            raise ValueError("--mscale-all-dim 0, which is Megatron's own: weft's is above 0")
        model["yarn"] = Yarn(original_max_seq=ORIGINAL, **numbers).model_dump()
