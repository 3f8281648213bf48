"""What experts ask of a layout. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.models.shape import Shape

if TYPE_CHECKING:
    from weft.config.layout import Layout


def check_experts(layout: Layout, shape: Shape, seq: int) -> None:
    """Refuse what experts cannot be dealt out or cut into.

    Raises:
        ValueError: naming the setting to change.
    """
    experts = shape.experts
    if experts is None:
        if layout.ep > 1 or layout.etp is not None:
            raise ValueError("layout.ep and layout.etp deal out experts, and this model has none: leave them out")
        if "experts" in layout.recompute:
            raise ValueError(f"layout.recompute = {layout.recompute}: this model has no experts; its MLPs are redo-mlp")
        return
    if experts.num_experts % layout.ep:
        raise ValueError(f"layout.ep = {layout.ep} does not divide model.experts.num_experts = {experts.num_experts}")
    if experts.ffn % layout.expert_tp:
        raise ValueError(f"layout.etp = {layout.expert_tp} does not divide model.experts.ffn = {experts.ffn}")
    if shape.shared_ffn % layout.tp:
        raise ValueError(
            f"layout.tp = {layout.tp} does not divide model.experts.shared·ffn = {shape.shared_ffn}, the width of the "
            "shared experts"
        )
    if seq // layout.cp % layout.tp:
        raise ValueError(
            f"each tp process routes its part of the sequence: layout.tp = {layout.tp} does not divide the "
            f"{seq // layout.cp} tokens of train.seq = {seq} that it has"
        )
    if layout.compile and layout.recompute != "none":
        raise ValueError(
            "layout.compile: a block with experts is compiled in two parts, before and behind them, and one that is "
            "recomputed would silently not be compiled at all: leave layout.recompute or compile out"
        )
