"""Attention to a part of the keys, with its log-sum-exp: parts worked out apart can be merged into the whole.

The log-sum-exp of a query's scores says how much each part weighs (Milakov and Gimelshein, Online normalizer calculation
for softmax, 2018; Dao et al., FlashAttention, 2022). Given that of the whole, the gradients of each part are exact too.
torch's own kernels do the work: its public function keeps the log-sum-exp to itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.models.attention import visible

aten = torch.ops.aten
LSE_ALIGNED = 32
"""What the memory-efficient kernel rounds the rows of its log-sum-exp up to."""


@dataclass(frozen=True)
class Sight:
    """Who sees whom in a sequence: every token itself and those before it, in its window and its document.

    `documents` are the numbers of the documents of all tokens, [B, T], of those of other processes too.
    """

    window: int | None
    documents: Tensor | None

    def reach(self, queries: range) -> range:
        """The tokens before `queries` that one of them may see."""
        return range(0 if self.window is None else max(0, queries.start - self.window + 1), queries.start)

    def tile(self, queries: range, keys: range, device: torch.device) -> Tile | None:
        """How these queries see these keys; None: not at all."""
        if not keys or keys[0] > queries[-1]:
            return None
        nearest, farthest = queries[0] - keys[-1], queries[-1] - keys[0]
        window = self.window or farthest + 1
        if nearest >= window:
            return None
        if self.documents is None and farthest < window:
            if nearest >= 0:
                return Tile()
            if queries == keys:
                return Tile(causal=True)
        return Tile(mask=visible(queries, keys, self.window, self.documents, device))


@dataclass(frozen=True)
class Tile:
    """Some queries against some keys: every key, those up to the query itself, or those where `mask` is true."""

    causal: bool = False
    mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [B, H, T, E], k and v [B, K, S, E] → result [B, H, T, E] and log-sum-exp [B, H, T] in fp32."""
        if q.is_cuda:
            out, lse = self._attend_cuda(q, k, v, scale)
        else:
            bias = self._bias(q)
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, self.causal, attn_mask=bias, scale=scale
            )
        if self.mask is not None:  # for a query that sees none of these keys kernels say 0, as if it saw some
            lse = lse.masked_fill(~self.mask.any(dim=-1), -math.inf)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from this tile. `out` and `lse` are those of attention to all keys, merged."""
        if q.is_cuda:
            return self._backward_cuda(grad, q, k, v, out, lse, scale)
        bias = self._bias(q)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, self.causal, attn_mask=bias, scale=scale
        )

    def _attend_cuda(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self._flash(q):
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.causal, scale=scale)
            return out, lse
        k, v = (_for_every_query_head(x, q) for x in (k, v))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, self._bias(q), True, 0.0, self.causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]

    def _backward_cuda(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = q.new_empty(2, dtype=torch.int64)  # the random state of a dropout that there is none of
        if self._flash(q):
            sizes = (None, None, q.shape[2], k.shape[2])
            return aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), *sizes, 0.0, self.causal, unused, unused, scale=scale
            )
        heads = k.shape[1]
        k, v = (_for_every_query_head(x, q) for x in (k, v))
        lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ALIGNED), value=math.inf)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, self._bias(q), out, lse, unused, unused, 0.0, [True, True, True, False], self.causal,
            scale=scale,
        )  # fmt: skip
        return dq, *(x.unflatten(1, (heads, -1)).sum(dim=2) for x in (dk, dv))

    def _flash(self, q: Tensor) -> bool:
        """Whether the GPU's flash kernel takes this: it knows no masks and no fp32, but heads that share their keys."""
        return self.mask is None and q.dtype != torch.float32

    def _bias(self, q: Tensor) -> Tensor | None:
        """The mask as numbers to add to the scores; on a GPU whole, in rows that begin at multiples of 16 bytes."""
        if self.mask is None:
            return None
        keys = self.mask.shape[-1]
        width = -(-keys // 8) * 8 if q.is_cuda else keys
        bias = q.new_zeros(*self.mask.shape[:-1], width)[..., :keys].masked_fill_(~self.mask, -math.inf)
        return bias.expand(*q.shape[:3], keys) if q.is_cuda else bias


def merge(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join the results of attention to two parts of the keys, in fp32. In `a`, every query has seen a key.

    Each is a result [B, H, T, E] and its log-sum-exp [B, H, T].
    """
    if a is None:
        return b[0].float(), b[1]
    lse = torch.logaddexp(a[1], b[1])
    mine, other = ((part[1] - lse).exp().unsqueeze(-1) for part in (a, b))
    return a[0] * mine + b[0] * other, lse


def _for_every_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
