"""Initial weights: a pure function of the seed and the parameter's name, never of how the model is cut."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from weft.models.shape import Shape

ROWS = 256
"""Rows drawn from one random stream: any part of a large matrix can be made without the rest."""


def initial_rows(shape: Shape, seed: int, name: str, sizes: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a parameter of the whole model, fp32 on the CPU.

    Matrices are normal with `shape.init_std`, those that write into the residual stream smaller by √(2·layers)
    (GPT-2 paper, 2.3); norms are 1, biases 0.
    """
    if len(sizes) == 1:
        return torch.full((stop - start,), 0.0 if name.endswith(".bias") else 1.0)
    std = shape.init_std
    if name.endswith(("attention.out.weight", ".down.weight")):
        std /= (2 * shape.num_layers) ** 0.5
    drawn = [_draw(seed, name, block, sizes) for block in range(start // ROWS, -(-stop // ROWS))]
    if not drawn:
        return torch.empty(0, *sizes[1:])
    offset = start // ROWS * ROWS
    return torch.cat(drawn)[start - offset : stop - offset] * std


def _draw(seed: int, name: str, block: int, sizes: tuple[int, ...]) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows = min(ROWS, sizes[0] - block * ROWS)
    return torch.randn(rows, *sizes[1:], generator=stream)
