"""The feed-forward half of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.shape import Shape


class GeluMLP(nn.Module):
    """GPT-2's: up, GELU (tanh form), down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=shape.out_bias)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=shape.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwigluMLP(nn.Module):
    """Llama's: SiLU of the gate times up, then down (Shazeer, GLU Variants, 2020). `ffn` wide, or as the shape says."""

    def __init__(self, shape: Shape, ffn: int | None = None) -> None:
        super().__init__()
        ffn = ffn or shape.ffn
        self.gate = nn.Linear(shape.hidden, ffn, bias=shape.out_bias)
        self.up = nn.Linear(shape.hidden, ffn, bias=shape.out_bias)
        self.down = nn.Linear(ffn, shape.hidden, bias=shape.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)
