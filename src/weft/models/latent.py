"""Multi-head latent attention (DeepSeek-V2, 2024, 2.1): keys and values of all heads are made of one short vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.models.attention import LayerCache, attend
from weft.models.norm import RMSNorm
from weft.models.rope import rotate_neighbours
from weft.models.shape import Shape

LATENT_EPS = 1e-6
"""Of the norms of latent vectors, whatever that of the others is: so the published models have it."""


class LatentAttention(nn.Module):
    """Holds as many heads as `q`, `kv` and `out` have rows or columns for. The latent vectors it makes whole.

    A head's queries and keys have two parts: one that knows no position, and one that is turned by it. Of keys the
    second is the same for all heads, and comes straight from the input.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        latent = shape.latent
        assert latent is not None
        self.latent = latent
        self.scale = shape.head_dim**-0.5 * (shape.yarn.score_scale if shape.yarn else 1.0)
        rank, heads = latent.q_rank, shape.num_heads
        self.q_down = nn.Linear(shape.hidden, rank, bias=False) if rank else None
        self.q_norm = RMSNorm(rank, eps=LATENT_EPS) if rank else None
        self.q = nn.Linear(rank or shape.hidden, heads * shape.head_dim, bias=False)
        self.kv_down = nn.Linear(shape.hidden, latent.kv_rank + latent.rope_dim, bias=False)
        self.kv_norm = RMSNorm(latent.kv_rank, eps=LATENT_EPS)
        self.kv = nn.Linear(latent.kv_rank, heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.out = nn.Linear(heads * latent.value_dim, shape.hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D] → [B, T, D]. `mask` as in `attend`. A cache takes the keys and values of each head."""
        assert rope is not None
        q = self.queries(x, rope).transpose(1, 2)
        k, v = (heads.transpose(1, 2) for heads in self.keys_and_values(x, rope))
        y = self.attend(q, k, v, mask, self.scale) if cache is None else cache.attend(q, k, v, self.scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, H, E]"""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        sizes = [self.latent.nope_dim, self.latent.rope_dim]
        plain, turned = self.q(x).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        return torch.cat((plain, rotate_neighbours(turned, rope)), dim=-1)

    def keys_and_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, H, E], and for the values [B, T, H, value_dim]."""
        latent, turned = self.kv_down(x).split([self.latent.kv_rank, self.latent.rope_dim], dim=-1)
        sizes = [self.latent.nope_dim, self.latent.value_dim]
        plain, v = self.kv(self.kv_norm(latent)).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        turned = rotate_neighbours(turned.unsqueeze(-2), rope).expand(-1, -1, plain.shape[-2], -1)
        return torch.cat((plain, turned), dim=-1), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return attend(q, k, v, mask, scale)
