"""What is computed again in backward, as Megatron-LM's arguments say it, and back. Torch-free.

Names and meanings: recompute_modules in megatron/core/transformer/transformer_config.py, August 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from weft.models.shape import Shape
from weft.plan.emit.shell import Options

KINDS = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules")
SELECTIVE = ("core_attn", "layernorm")
"""As which weft's `selective` is written."""
CHEAP = {*SELECTIVE, "moe_act"}
"""What it is nearest to."""
MIXTURE = ("experts' products", "experts' activation functions")
PIECES = {
    "none": (),
    "core_attn": (),
    "layernorm": ("norms",),
    "moe_act": ("experts' activation functions",),
    "mla_up_proj": ("the latents' projections",),
    "mlp": ("dense MLPs",),
    "moe": (*MIXTURE, "shared experts"),
    "shared_experts": ("shared experts",),
    "selective": ("norms", "experts' activation functions"),
    "redo-attention": ("the latents' projections", "all else of attention"),
    "redo-mlp": ("dense MLPs", *MIXTURE, "shared experts"),
    "redo-experts": MIXTURE,
}
"""What is computed again with a module of Megatron's, and with a form of weft's. What fused attention, core_attn, keeps is
little, and left out; so are the norms of a part that is computed again."""


def redone_mlp(shape: Shape) -> list[str]:
    """The modules that redo-mlp computes again: `mlp` is that of dense blocks alone."""
    return ["mlp", "moe"] if shape.experts else ["mlp"]


def arguments(text: str, shape: Shape) -> Iterator[str]:
    if text == "full":
        yield from ("--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1")
    elif text.startswith("full:"):
        yield from ("--recompute-granularity full", "--recompute-method block", f"--recompute-num-layers {text[5:]}")
    elif text in ("selective", "redo-mlp"):
        modules = SELECTIVE if text == "selective" else redone_mlp(shape)
        yield from ("--recompute-granularity selective", f"--recompute-modules {' '.join(modules)}")


def take(there: Options, layout: dict[str, Any], shape: Shape) -> list[str]:
    """Move it from the arguments into the layout, and say where modules are another part of a block than weft's. What is
    not among these stays in `there`, and is told."""
    kind, modules = there.get("--recompute-granularity"), there.get("--recompute-modules") or list(SELECTIVE[:1])
    method, count = there.get("--recompute-method"), there.get("--recompute-num-layers")
    differing = ""
    if kind == ["full"] and method == ["uniform"] and count in (["1"], None):
        layout["recompute"] = "full"
    elif kind == ["full"] and method == ["block"] and count:
        layout["recompute"] = f"full:{count[0]}" if count != ["0"] else "none"
    elif kind == ["selective"]:
        layout["recompute"], differing = nearest(set(modules), shape)
    else:
        return []
    for name in KINDS if kind == ["selective"] else KINDS[:3]:
        there.pop(name, None)
    if not differing:
        return []
    return [f"of --recompute-modules {' '.join(modules)} the difference to {layout['recompute']}, which {differing}"]


def nearest(modules: set[str], shape: Shape) -> tuple[str, str]:
    """weft's recomputation that is nearest to Megatron's of these modules, and in what it differs."""
    mixed = shape.experts is not None
    latent, mlp = "mla_up_proj" in modules and shape.latent is not None, ("moe" if mixed else "mlp") in modules
    inside = latent and not mlp and mixed and "moe_act" in modules  # else selective has it
    parts = [part for part, there in (("attention", latent), ("mlp", mlp), ("experts", inside)) if there]
    recompute = f"redo-{'+'.join(parts)}" if parts else "selective" if modules & CHEAP else "none"
    wanted, done = _pieces(modules, shape), _pieces([f"redo-{part}" for part in parts] or [recompute], shape)
    wanted -= {"norms"} if parts else set()
    differs = [("also computes again", done - wanted), ("keeps", wanted - done)]
    return recompute, " and ".join(f"{verb} {', '.join(sorted(pieces))}" for verb, pieces in differs if pieces)


def _pieces(names: Iterable[str], shape: Shape) -> set[str]:
    """Of those that this model has, the pieces that are computed again with modules of Megatron's, or parts of weft's."""
    experts = shape.experts
    lacking = {
        "dense MLPs": experts is not None and not experts.dense_layers,
        "the latents' projections": shape.latent is None,
        "shared experts": not shape.shared_ffn,
        "experts' products": experts is None,
        "experts' activation functions": experts is None,
    }
    return {piece for name in names for piece in PIECES.get(name, (name,)) if not lacking.get(piece, False)}
