"""What precision, offload and async_tp ask of a layout and a model. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.config.recompute import Recompute
from weft.models.shape import Shape

if TYPE_CHECKING:
    from weft.config.layout import Layout

FP8 = ("fp8", "fp8row")
FP8_ALIGNED = 16
"""What every side of a matrix product in fp8 is a multiple of: cuBLAS's condition, held to on a CPU too."""


def check_computation(layout: Layout) -> None:
    """Raises: ValueError: the layout's precision, gradients, offload or compile do not go with each other."""
    if layout.offload and layout.compile:
        raise ValueError(
            "layout.offload takes what a block keeps one by one, and a compiled one hides that: leave one out"
        )
    if layout.offload_weights and layout.fsdp == 1 and layout.precision == "fp32":
        raise ValueError(
            "layout.offload_weights is FSDP2's, which nothing needs here: set layout.fsdp above 1 or "
            "layout.precision = bf16, or leave it out"
        )
    if layout.offload_weights and layout.offload_optimizer:
        raise ValueError(
            "layout.offload_weights keeps weights and moments on the CPU, so there is nothing for layout.offload_optimizer "
            "to copy there: leave one of them out"
        )
    if layout.gradients == "bf16" and layout.precision not in ("bf16", *FP8):
        raise ValueError("layout.gradients = bf16 is for gradients that come in bf16: set layout.precision = bf16")
    if layout.async_tp:
        _check_async_tp(layout)


def _check_async_tp(layout: Layout) -> None:
    recompute = Recompute.parse(layout.recompute)
    refused = {
        "puts products under the messages of sp: set layout.sp": not layout.sp,
        f"multiplies in 16 or 32 bits, and layout.precision = {layout.precision}: choose bf16": layout.precision in FP8,
        "takes products and messages together, and a compiled block takes them apart": layout.compile,
        f"makes a matrix's gradients at once, and layout.schedule = {layout.schedule} puts those of weights off: "
        "choose 1f1b or interleaved": layout.splits_backward,
        f"goes with whole blocks computed again, and layout.recompute = {layout.recompute} means parts of them: "
        "choose full or none": bool(recompute.keeps or recompute.redone),
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ValueError(f"layout.async_tp {reason}, or leave async_tp out")


def check_fp8(layout: Layout, shape: Shape, tokens: int) -> None:
    """Refuse what fp8 does not multiply.

    Args:
        tokens: of one forward pass on one process.

    Raises:
        ValueError: naming the setting to change.
    """
    if layout.precision not in FP8:
        return
    what = f"layout.precision = {layout.precision}"
    if shape.num_layers < 3:
        raise ValueError(
            f"{what} leaves the first and the last block in bf16: model.num_layers = {shape.num_layers} of 3"
        )
    sizes = {
        "model.hidden": shape.hidden,
        "model.num_heads · head_dim / layout.tp": shape.num_heads * shape.head_dim // layout.tp,
        "model.num_kv_heads · head_dim / layout.tp": shape.num_kv_heads * shape.head_dim // layout.tp,
        "model.ffn / layout.tp": shape.ffn // layout.tp if not shape.has_experts(0) else FP8_ALIGNED,
        **_latent_sizes(shape, layout.tp),
        "model.experts.shared · ffn / layout.tp": shape.shared_ffn // layout.tp,
        "the tokens of a pass, layout.micro_batch · train.seq / layout.cp": tokens,
    }
    for name, size in sizes.items():
        if size % FP8_ALIGNED:
            raise ValueError(f"{what} multiplies matrices whose sides are multiples of {FP8_ALIGNED}: {name} = {size}")


def _latent_sizes(shape: Shape, tp: int) -> dict[str, int]:
    if shape.latent is None:
        return {}
    latent, heads = shape.latent, shape.num_heads // tp
    return {
        "model.latent.q_rank": latent.q_rank or 0,
        "model.latent.kv_rank": latent.kv_rank,
        "model.latent.kv_rank + rope_dim": latent.kv_rank + latent.rope_dim,
        "model.num_heads · (nope_dim + value_dim) / layout.tp": heads * (latent.nope_dim + latent.value_dim),
        "model.num_heads · value_dim / layout.tp": heads * latent.value_dim,
    }
