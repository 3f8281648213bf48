"""Causal self-attention: multi-head or grouped-query, with optional rotary positions, qk-norm and key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.norm import RMSNorm
from weft.models.rope import rotate
from weft.models.shape import Shape


class LayerCache(Protocol):
    """Keys and values of the tokens seen so far, of one layer. It knows who sees whom."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Add k and v [B, K, T, E] of the new tokens, and attend to all so far: q [B, H, T, E] → [B, H, T, E]."""


class Attention(nn.Module):
    """Holds as many heads as its matrices have rows for: cut them by head and it works on that share."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q = nn.Linear(shape.hidden, query, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.out = nn.Linear(query, shape.hidden, bias=shape.out_bias)
        self.q_norm = RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D] → [B, T, D]. `mask` as in `attend`."""
        q, k, v = (self.heads(y) for y in self.products(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:  # before the heads come first: so the result of attention lies as `out` reads it
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = self.attend(q, k, v, mask) if cache is None else cache.attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, each of all heads in a row."""
        return self.q(x), self.k(x), self.v(x)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention. q [B, H, T, E], k and v [B, K, S, E] → [B, H, T, E]; v, and so the result, may be narrower.

    mask: bool, broadcastable to [B, H, T, S], true where a token may look; None: causal, and a single token sees all.
    scale: of the scores; None: 1/√E.
    """
    grouped = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    width = v.shape[-1]
    v = F.pad(v, (0, k.shape[-1] - width)) if width < k.shape[-1] else v  # kernels want heads of one size
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped, scale=scale)
    return y[..., :width]


def attention_mask(seq: int, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor | None:
    """Who sees whom among `seq` tokens: bool [1 or B, 1, T, T]; None where plain causal says it all.

    Args:
        window: each token sees this many tokens back, itself included.
        documents: number of each token's document, [B, T]; none sees another.
    """
    if documents is None and (window is None or window >= seq):
        return None
    return visible(range(seq), range(seq), window, documents, device)


def visible(queries: range, keys: range, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor:
    """Which of the tokens `queries` of a sequence sees which of `keys`: bool [1 or B, 1, T, S]."""
    token, other = (torch.arange(tokens.start, tokens.stop, device=device) for tokens in (queries, keys))
    distance = token[:, None] - other[None, :]
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if documents is None:
        return mask[None, None]
    return mask & (documents[:, None, token, None] == documents[:, None, None, other])
