"""Shape: the sizes of a decoder, and what follows from them. Torch-free.

Letters used for tensor dims all over weft:

    B batch    T tokens of a sequence    D hidden    H heads    K kv heads    E head_dim    F ffn    V vocab    L layers
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3"]


class RopeScaling(BaseModel):
    """Llama 3.1's stretch of the rotary frequencies (The Llama 3 Herd of Models, 2024)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq: int


class Shape(BaseModel):
    """The sizes of one decoder-only transformer.

    `family` names the Hugging Face architecture that the weights are written as; every difference that the model code
    acts on is a field of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = "llama"
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_seq: int
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False  # attention output and both MLP matrices
    qk_norm: bool = False
    tied: bool = False  # the head is the token embedding
    sliding_window: int | None = None  # each token sees this many tokens, itself included
    init_std: float = 0.02

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Sizes that follow from others may be left out: kv heads, head_dim, ffn; a family brings its switches."""
        if not isinstance(values, dict):
            return values
        values = {**FAMILY_SWITCHES.get(values.get("family", "llama"), {}), **values}
        if "num_heads" in values:
            values.setdefault("num_kv_heads", values["num_heads"])
            if "hidden" in values:
                values.setdefault("head_dim", values["hidden"] // max(1, values["num_heads"]))
        if "hidden" in values and values.get("activation") == "gelu":
            values.setdefault("ffn", 4 * values["hidden"])
        return values

    @model_validator(mode="after")
    def _check(self) -> Shape:
        sizes = ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab", "max_seq")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads ({self.num_kv_heads}) must divide model.num_heads ({self.num_heads}): "
                "each kv head serves the same number of query heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even: rotary positions turn pairs of numbers")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"model.sliding_window is {self.sliding_window}; leave it out for full attention")
        return self

    @property
    def block_params(self) -> int:
        """Parameters of one block."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden * (query + 2 * kv) + query * self.hidden
        attention += (query + 2 * kv) * self.qkv_bias + self.hidden * self.out_bias + 2 * self.head_dim * self.qk_norm
        biases = (self.mlp_matrices - 1) * self.ffn + self.hidden
        mlp = self.mlp_matrices * self.hidden * self.ffn + biases * self.out_bias
        return attention + mlp + 2 * self.norm_params

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.activation == "swiglu" else 2

    @property
    def norm_params(self) -> int:
        return self.hidden * (2 if self.norm == "layernorm" else 1)

    @property
    def embedding_params(self) -> int:
        """Token embedding and learned positions."""
        return self.vocab * self.hidden + (self.max_seq * self.hidden if self.positions == "learned" else 0)

    @property
    def head_params(self) -> int:
        """The output matrix; 0 where it is the token embedding."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def num_params(self) -> int:
        return self.embedding_params + self.num_layers * self.block_params + self.norm_params + self.head_params

    @property
    def block_matmul_params(self) -> int:
        """Parameters of one block that a token is multiplied with."""
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.ffn

    def flops_per_token(self, seq: int, *, causal: bool) -> float:
        """Model FLOPs of training on one token: forward and backward, no recompute.

        6 per matmul parameter (head included, embedding lookup not), and 12·L·H·E·T for attention scores and values
        (PaLM, appendix B). `causal` counts only the scores that the mask keeps: half of them, or, with a window W
        shorter than the sequence, W - W²/2T a token. Not causal, a window counts as W.
        """
        matmul = 6 * (self.num_layers * self.block_matmul_params + self.vocab * self.hidden)
        window = min(seq, self.sliding_window or seq)
        seen = window - window**2 / (2 * seq) if causal else window
        return matmul + 12 * self.num_layers * self.num_heads * self.head_dim * seen


FAMILY_SWITCHES: dict[str, dict] = {
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "activation": "gelu",
        "qkv_bias": True, "out_bias": True, "tied": True,
    },
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0},
}  # fmt: skip
"""What each family sets apart from Shape's own defaults."""
