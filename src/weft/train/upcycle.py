"""Upcycling: a dense model's weights become those of a mixture of experts (Komatsuzaki et al., Sparse Upcycling, 2023).

Every expert starts as a copy of the dense block's MLP, and the router at random. The weights of a token's experts add up to
1, so the new model computes what the dense one did; tokens that go to other experts then let these grow apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weft.checkpoint.region import Region
from weft.checkpoint.weights import WeightsFolder
from weft.models.shape import Shape

FREE = {"family", "experts"}
"""What differs between the shapes."""


def check_upcycled(dense: Shape, shape: Shape) -> None:
    """
    Raises:
        ValueError: the mixture would not compute what the dense model does.
    """
    experts = shape.experts
    assert experts is not None
    must = {
        "experts.ffn": (experts.ffn, dense.ffn),
        "experts.norm_topk": (experts.norm_topk, True),
        "experts.scaling": (experts.scaling, 1.0),
        "experts.shared": (experts.shared, 0),
        "activation": (dense.activation, "swiglu"),
        "out_bias": (dense.out_bias, False),
    }
    wrong = [f"model.{name} = {is_}, should be {wanted}" for name, (is_, wanted) in must.items() if is_ != wanted]
    if wrong:
        raise ValueError(
            f"train.init_from holds a dense model, and experts cannot be copies of its MLP: {', '.join(wrong)}"
        )


def upcycled(weights: WeightsFolder, otherwise: Callable[[Region], Tensor]) -> Callable[[Region], Tensor]:
    """Reads regions of the mixture from the dense model's folder; `otherwise` gives those of routers."""

    def read(region: Region) -> Tensor:
        block, _, module = region.name.partition(".mlp.")
        if module.startswith("router."):
            return torch.zeros(region.dims) if module == "router.bias" else otherwise(region)
        if not module.startswith("experts."):
            return weights.read(region, torch.float32)
        _, _, matrix = module.split(".", 2)  # experts.3.gate.weight
        name = f"{block}.mlp.{matrix}"
        if not matrix.startswith("down."):
            return weights.read(Region(name, region.sizes, region.start, region.stop), torch.float32)
        turned = Region(name, region.sizes[::-1], region.start[::-1], region.stop[::-1])
        return weights.read(turned, torch.float32).T  # experts keep it by the rows of what it reads: models/moe.py

    return read
