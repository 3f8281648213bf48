"""Matrices that are multiplied with the same numbers, as one matrix: on a GPU, where each product is a launch, and a small
one leaves most of the GPU idle. The model's own weights become views of it, so that nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.attention import Attention
from weft.models.mlp import SwigluMLP


class Joined:
    """Several linear layers of one input."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [len(layer.weight) for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        for name, whole in (("weight", self.weight), ("bias", self.bias)):
            for layer, part in zip(layers, whole.split(self.sizes) if whole is not None else (), strict=False):
                setattr(layer, name, nn.Parameter(part, requires_grad=False))

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


class JoinedAttention(Attention):
    joined: Joined

    def products(self, x: Tensor) -> Sequence[Tensor]:
        return self.joined(x)


class JoinedSwigluMLP(SwigluMLP):
    joined: Joined

    def inner(self, x: Tensor) -> Tensor:
        gate, up = self.joined(x)
        return F.silu(gate) * up


def join(model: nn.Module) -> None:
    """From here on the model is served so. Layers that are more than a product stay as they are."""
    for module in model.modules():
        if type(module) is Attention and all_plain(module.q, module.k, module.v):
            joined = Joined((module.q, module.k, module.v))
            module.__class__ = JoinedAttention
            assert isinstance(module, JoinedAttention)
            module.joined = joined
        elif type(module) is SwigluMLP and all_plain(module.gate, module.up):
            joined = Joined((module.gate, module.up))
            module.__class__ = JoinedSwigluMLP
            assert isinstance(module, JoinedSwigluMLP)
            module.joined = joined


def all_plain(*layers: nn.Module) -> bool:
    return all(type(layer) is nn.Linear for layer in layers)
