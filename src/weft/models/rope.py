"""Rotary position embedding (Su et al., RoFormer, 2021), with the stretched frequencies of Llama 3.1 and of YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.models.shape import Shape, Yarn


def frequencies(shape: Shape, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head's numbers, [E/2], fp32."""
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.int64, device=device).float() / shape.rotary_dim
    base = 1.0 / (shape.rope_theta**exponents)
    if shape.yarn is not None:
        return _yarn(base, shape, shape.yarn)
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


def _yarn(base: Tensor, shape: Shape, yarn: Yarn) -> Tensor:
    """Slow pairs are stretched, fast ones left alone, and between the two of `beta` the stretch comes in evenly."""
    ends = []
    for turns in (yarn.beta_fast, yarn.beta_slow):  # within the original context
        pair = math.log(yarn.original_max_seq / (turns * 2 * math.pi)) / math.log(shape.rope_theta)
        ends.append(pair * shape.rotary_dim / 2)
    first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), shape.rotary_dim - 1)
    pairs = torch.arange(len(base), dtype=torch.float32, device=base.device)
    stretched = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return base / yarn.factor * stretched + base * (1 - stretched)


def rope_table(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [..., T, E/2] in fp32, for positions [..., T]."""
    angles = positions.float().unsqueeze(-1) * frequencies(shape, positions.device)
    if shape.yarn is not None and (scale := shape.yarn.rotated_scale) != 1:
        return angles.cos() * scale, angles.sin() * scale
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of each head as pairs. x [B, T, H, E]; the result has x's dtype."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def rotate_neighbours(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The same of numbers that lie pair by pair; of the result, the first of all pairs come first."""
    return rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), table)
