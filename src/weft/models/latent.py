"""Multi-head latent attention (DeepSeek-V2, 2024, 2.1): keys and values of all heads are made of one short vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.attention import attend
from weft.models.norm import RMSNorm
from weft.models.rope import rotate_neighbours
from weft.models.shape import Shape

LATENT_EPS = 1e-6
"""Of the norms of latent vectors, whatever that of the others is: so the published models have it."""


Look = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""How queries look at what a cache keeps: `LatentAttention.look`."""


class LatentCache(Protocol):
    """As attention.py's LayerCache, but what it keeps is one vector a token, of which keys and values are made."""

    def attend(self, q: Tensor, latents: Tensor, look: Look) -> Tensor:
        """Add latents [B, 1, T, kv_rank + rope_dim] of the new tokens; what all so far are to q [B, H, T, E]."""


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
        cache: LatentCache | None = None,
    ) -> Tensor:
        """x [B, T, D] → [B, T, D]. `mask` as in `attend`. A cache takes the vectors that keys and values are made of."""
        assert rope is not None
        q = self.queries(x, rope).transpose(1, 2)
        vector, turned = self.latents(x, rope)
        if cache is None:
            k, v = self.keys_and_values(self.kv(vector), turned)
            y = self.attend(q, k, v, mask, self.scale)
        else:
            y = cache.attend(q, torch.cat((vector, turned), dim=-1).unsqueeze(1), self.look)
        return self.out(y.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, H, E]"""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        sizes = [self.latent.nope_dim, self.latent.rope_dim]
        plain, turned = self.q(x).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        return torch.cat((plain, rotate_neighbours(turned, rope)), dim=-1)

    def latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The vector of each token, [B, T, kv_rank], and the turned part of its keys, [B, T, rope_dim]."""
        vector, turned = self.kv_down(x).split([self.latent.kv_rank, self.latent.rope_dim], dim=-1)
        return self.kv_norm(vector), rotate_neighbours(turned.unsqueeze(-2), rope).squeeze(-2)

    def keys_and_values(self, made: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Of what `kv` makes of S vectors, [B, S, H·(nope_dim + value_dim)]: [B, H, S, E] and [B, H, S, value_dim]."""
        sizes = [self.latent.nope_dim, self.latent.value_dim]
        plain, v = made.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        turned = turned.unsqueeze(-2).expand(-1, -1, plain.shape[-2], -1)
        return torch.cat((plain, turned), dim=-1).transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return attend(q, k, v, mask, scale)

    def look(self, q: Tensor, latents: Tensor, mask: Tensor | None, up: Tensor | None = None) -> Tensor:
        """q [B, H, T, E] at the vectors of a cache, [B, 1, S, kv_rank + rope_dim], → [B, H, T, value_dim].

        Args:
            mask: added to the scores, [B, 1, T, S]; None: the S are the T, causal.
            up: in place of the matrix of `kv`.
        """
        new, seen = q.shape[2], latents.shape[2]
        if mask is not None and not self.makes_keys(new, seen):
            return self.look_absorbed(q, latents, mask, self.kv.weight if up is None else up)
        vector, turned = latents[:, 0].split([self.latent.kv_rank, self.latent.rope_dim], dim=-1)
        made = self.kv(vector) if up is None else F.linear(vector, up)
        k, v = self.keys_and_values(made, turned)
        return attend(q, k, v, mask, self.scale)

    def makes_keys(self, new: int, seen: int) -> bool:
        """Whether making every head's keys and values of `seen` vectors is less work than looking at the vectors.

        It is where many look: with the sizes of DeepSeek-V2 and V3, some 170 tokens.
        """
        size = self.latent
        map_one = size.kv_rank * (size.nope_dim + size.value_dim)  # multiplications of each head, for one token
        by_keys = seen * map_one + new * seen * (size.nope_dim + size.rope_dim + size.value_dim)
        by_vectors = new * map_one + new * seen * (2 * size.kv_rank + size.rope_dim)
        return by_keys <= by_vectors

    def look_absorbed(self, q: Tensor, latents: Tensor, mask: Tensor, up: Tensor) -> Tensor:
        """The same without any head's keys or values: q · (W c) is (Wᵀ q) · c, and a sum of W c is W times the sum of c.

        So all heads look at the same vectors, which are keys and values in one: they stand as tokens of a single head.
        """
        size, (batch, _, new, _) = self.latent, q.shape
        keys, values = up.unflatten(0, (-1, size.nope_dim + size.value_dim)).split(
            [size.nope_dim, size.value_dim], dim=1
        )
        plain, turned = q.split([size.nope_dim, size.rope_dim], dim=-1)
        q = torch.cat((torch.einsum("bhtn,hnr->bhtr", plain, keys), turned), dim=-1)
        mask = mask.repeat(1, 1, q.shape[1], 1) if new > 1 else mask
        y = attend(q.flatten(1, 2).unsqueeze(1), latents, latents, mask, self.scale)[..., : size.kv_rank]
        return torch.einsum("bhtr,hvr->bhtv", y.view(batch, -1, new, size.kv_rank), values)
