"""Rotary position embedding (Su et al., RoFormer, 2021), with Llama 3.1's stretched frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.models.shape import Shape


def frequencies(shape: Shape, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head's numbers, [E/2], fp32."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim
    base = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return base
    wavelength = 2 * math.pi / base
    long, short = (scaling.original_max_seq / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
    # between the two wavelengths the stretch comes in smoothly
    smooth = (scaling.original_max_seq / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    stretched = torch.where(wavelength > long, base / scaling.factor, base)
    return torch.where((wavelength >= short) & (wavelength <= long), blended, stretched)


def rope_table(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [..., T, E/2] in fp32, for positions [..., T]."""
    angles = positions.float().unsqueeze(-1) * frequencies(shape, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of each head as pairs. x [B, T, H, E]; the result has x's dtype."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
