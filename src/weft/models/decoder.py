"""The decoder: one plain family that covers GPT-2/3, Llama, Mistral, Qwen, DeepSeek and mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.models.attention import Attention, LayerCache, attention_mask
from weft.models.head import Head
from weft.models.latent import LatentAttention, LatentCache
from weft.models.mlp import GeluMLP, SwigluMLP
from weft.models.moe import MoE
from weft.models.norm import RMSNorm
from weft.models.rope import rope_table
from weft.models.shape import Shape


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(shape)
        self.attention = LatentAttention(shape) if shape.latent else Attention(shape)
        self.mlp_norm = make_norm(shape)
        self.mlp = make_mlp(shape, index)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | LatentCache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A decoder-only transformer, or a run of its blocks.

    Args:
        blocks: which blocks to hold; all by default. The embedding goes with the first one and the head with the
            last, and every parameter keeps its name of the whole model.
    """

    attention_mask = staticmethod(attention_mask)

    def __init__(self, shape: Shape, blocks: range | None = None) -> None:
        super().__init__()
        self.shape = shape
        blocks = blocks if blocks is not None else range(shape.num_layers)
        first, last = blocks.start == 0, blocks.stop == shape.num_layers
        learned = first and shape.positions == "learned"
        self.embed = make_embedding(shape.vocab, shape.hidden) if first else None
        self.positions = make_embedding(shape.max_seq, shape.hidden) if learned else None
        self.blocks = nn.ModuleDict({str(index): Block(shape, index) for index in blocks})
        self.norm = make_norm(shape) if last else None
        self.head = Head(shape.hidden, shape.vocab) if last else None
        self.tie()

    def tie(self) -> None:
        """Make a tied head's matrix the token embedding. To be called again after parameters were replaced."""
        if self.shape.tied and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T] (or hidden states [B, T, D] where the embedding is not held) → logits [B, T, V], or hidden.

        Args:
            positions: of each token, [B, T] or [T]; None: 0, 1, 2, … Needed where x is hidden states.
            documents: number of each token's document, [B, T]: attention stays inside.
            targets: [B, T], for a head that makes a loss of them; that comes back.
        """
        x = self.body(x, positions, documents)
        if self.norm is not None and self.head is not None:
            x = self.norm(x)
            x = self.head(x) if targets is None else self.head(x, targets)
        return x

    def body(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        caches: Sequence[LayerCache | LatentCache] | None = None,
    ) -> Tensor:
        """All but the last norm and the head: as `forward`, hidden states [B, T, D] come back.

        Args:
            caches: one a block, for generation; they say who sees whom.
        """
        positions = positions if positions is not None else torch.arange(x.shape[1], device=x.device)
        mask = None
        if caches is None:
            mask = self.attention_mask(positions.shape[-1], self.shape.sliding_window, documents, x.device)
        rope = rope_table(self.shape, positions) if self.shape.positions == "rotary" else None
        x = self.enter(x, positions)
        for index, block in enumerate(self.blocks.values()):
            x = block(x, rope, mask, caches[index] if caches is not None else None)
        return x

    def enter(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block here gets: embeddings of tokens [B, T], or hidden states as they are."""
        if self.embed is not None:
            x = self.embed(x)
        if self.positions is not None:
            x = x + self.positions(positions)
        return x


def make_mlp(shape: Shape, block: int) -> nn.Module:
    if shape.has_experts(block):
        return MoE(shape)
    return SwigluMLP(shape) if shape.activation == "swiglu" else GeluMLP(shape)


def make_norm(shape: Shape) -> nn.Module:
    kind = RMSNorm if shape.norm == "rmsnorm" else nn.LayerNorm
    return kind(shape.hidden, eps=shape.norm_eps)


def make_embedding(rows: int, hidden: int) -> nn.Embedding:
    """torch's own; but drawing numbers on meta, which are never there, would import torch's compiler: 2 s a start."""
    weight = torch.empty(rows, hidden)
    return nn.Embedding(rows, hidden, _weight=weight if weight.is_meta else nn.init.normal_(weight))
