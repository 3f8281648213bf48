"""Bytes of activations of latent attention. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from weft.config.layout import Layout
from weft.models.shape import Shape

FLOAT = 4


@dataclass(frozen=True)
class LatentPass:
    """One micro-batch in the latent attention of one block on one process, in bytes, as activations.py has the rest.

    Values narrower than keys are filled up for it, and its result is copied without that.

    Attributes:
        normed: the latent vectors.
        down: before their norms; of keys also the numbers that are turned by position.
        statistics: of those norms.
        query: what `q` gives, as wide as the keys, and as filled-up values.
        up: what `kv` gives.
        result: of attention, as `out` reads it.
        filled: whether values are narrower than keys.
    """

    normed: int
    down: int
    statistics: int
    query: int
    up: int
    result: int
    filled: bool

    @classmethod
    def of(cls, shape: Shape, layout: Layout, number: int, tokens: int) -> LatentPass:
        """`number`: bytes of one number of every token."""
        latent, heads = shape.latent, shape.num_heads // layout.tp
        assert latent is not None
        normed = number * ((latent.q_rank or 0) + latent.kv_rank)
        return cls(
            normed=normed,
            down=normed + number * latent.rope_dim,
            statistics=FLOAT * tokens * (2 if latent.q_rank else 1),
            query=number * heads * shape.head_dim,
            up=number * heads * (latent.nope_dim + latent.value_dim),
            result=number * heads * latent.value_dim,
            filled=latent.value_dim < shape.head_dim,
        )

    @property
    def attention(self) -> int:
        """Everything but the log-sum-exp and a mask."""
        values = 2 * self.query + self.result if self.filled else self.up + self.result
        return self.down + self.normed + self.statistics + 2 * self.query + values

    @property
    def products(self) -> int:
        """What its matrices give, but the last."""
        return self.down + self.query + self.up

    @property
    def inputs(self) -> int:
        """What its matrices take, but those that take the block's own."""
        return self.normed + self.result
