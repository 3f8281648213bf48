"""Shape: the sizes of a decoder, and what follows from them. Torch-free.

Letters used for tensor dims all over weft:

    B batch    T tokens of a sequence    D hidden    H heads    K kv heads    E head_dim    F ffn    V vocab    L layers
    X experts    N tokens of all sequences
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weft.models.parameters import block_sizes
from weft.models.stretch import RopeScaling, Yarn

__all__ = ["Experts", "Family", "Latent", "RopeScaling", "Shape", "Yarn"]

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


class Latent(BaseModel):
    """Multi-head latent attention: keys and values of all heads are made of one short vector (DeepSeek-V2, 2024, 2.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    q_rank: int | None = Field(
        None, ge=1, description="numbers of the vector that queries are made of; left out: of hidden"
    )
    kv_rank: int = Field(ge=1, description="numbers of the vector that keys and values are made of")
    nope_dim: int = Field(ge=1, description="numbers of each head's queries and keys that know no position")
    rope_dim: int = Field(ge=2, description="those that do; all heads' keys have the same")
    value_dim: int = Field(ge=1, description="numbers of each head's values")

    @model_validator(mode="after")
    def _check(self) -> Latent:
        if self.rope_dim % 2:
            raise ValueError(
                f"model.latent.rope_dim ({self.rope_dim}) must be even: rotary positions turn pairs of numbers"
            )
        if self.value_dim > self.nope_dim + self.rope_dim:
            raise ValueError(
                f"model.latent.value_dim ({self.value_dim}) is more than nope_dim + rope_dim "
                f"({self.nope_dim + self.rope_dim}): attention takes values that are as wide as keys, or narrower"
            )
        return self


class Experts(BaseModel):
    """The experts that take the place of a block's MLP, and how a token finds its own (Shazeer et al., 2017)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int = Field(ge=1, description="experts of each block")
    per_token: int = Field(ge=1, description="of them, those that work on one token")
    ffn: int = Field(ge=1, description="width of one expert")
    dense_layers: int = Field(0, ge=0, description="the first blocks have a plain MLP")
    norm_topk: bool = Field(True, description="the weights of a token's experts add up to 1")
    shared: int = Field(
        0, ge=0, description="experts that every token meets beside its own: one MLP, so many times as wide"
    )
    scores: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="how well an expert suits a token; to sigmoid scores a bias is added where experts are chosen",
    )
    groups: int = Field(1, ge=1, description="experts are chosen within the best of so many groups")
    top_groups: int = Field(1, ge=1, description="groups that a token may have experts of")
    scaling: float = Field(1.0, gt=0, description="of the weights of a token's experts")

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added to the scores where experts are chosen."""
        return self.scores == "sigmoid"

    @model_validator(mode="after")
    def _check(self) -> Experts:
        if self.per_token > self.num_experts:
            raise ValueError(
                f"model.experts.per_token ({self.per_token}) is more than model.experts.num_experts ({self.num_experts})"
            )
        if self.num_experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"model.experts.groups ({self.groups}) must divide num_experts ({self.num_experts}), "
                f"and top_groups ({self.top_groups}) be no more of them"
            )
        size = self.num_experts // self.groups
        if self.groups > 1 and (self.per_token > self.top_groups * size or size < 2):
            raise ValueError(
                f"model.experts.groups: each of {self.groups} has {size} experts, of which two at least are compared, and "
                f"top_groups ({self.top_groups}) of them have to hold per_token ({self.per_token})"
            )
        return self


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    values = {**FAMILY_SWITCHES.get(values.get("family", "llama"), {}), **values}
    values = {name: int(it) if isinstance(it, str) and it.isdecimal() else it for name, it in values.items()}
    if "num_heads" in values:
        values.setdefault("num_kv_heads", values["num_heads"])
        latent = values.get("latent")
        latent = latent.model_dump() if isinstance(latent, Latent) else latent
        if isinstance(latent, dict) and {"nope_dim", "rope_dim"} <= latent.keys():
            values.setdefault("head_dim", latent["nope_dim"] + latent["rope_dim"])
        if "hidden" in values:
            values.setdefault("head_dim", values["hidden"] // max(1, values["num_heads"]))
    if "hidden" in values and values.get("activation") == "gelu":
        values.setdefault("ffn", 4 * values["hidden"])
    if isinstance(values.get("experts"), dict) and "ffn" in values:
        values["experts"] = {"ffn": values["ffn"], **values["experts"]}
    return values


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
    yarn: Yarn | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False  # attention output and both MLP matrices
    experts: Experts | None = None
    latent: Latent | None = None
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
        try:
            return _filled(values)
        except TypeError:  # something is no number: its own field says so, and not those that follow from it
            return {"num_kv_heads": 1, "head_dim": 1, "ffn": 1, **values}

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
        if self.positions == "rotary" and self.latent is None and self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even: rotary positions turn pairs of numbers")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"model.sliding_window is {self.sliding_window}; leave it out for full attention")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.yarn is not None and self.rope_scaling is not None:
            raise ValueError("model.yarn and model.rope_scaling both stretch the rotary frequencies: leave one out")
        if self.experts is not None and (self.activation != "swiglu" or self.out_bias):
            raise ValueError("model.experts are computed with activation swiglu and without out_bias; change those")
        return self

    def _check_latent(self, latent: Latent) -> None:
        if self.head_dim != latent.nope_dim + latent.rope_dim:
            raise ValueError(
                f"model.head_dim ({self.head_dim}) is nope_dim + rope_dim of model.latent "
                f"({latent.nope_dim + latent.rope_dim}): leave it out"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"model.num_kv_heads ({self.num_kv_heads}): with model.latent every head has its own keys; leave it out"
            )
        if self.positions != "rotary" or self.norm != "rmsnorm" or self.qkv_bias or self.out_bias or self.qk_norm:
            raise ValueError(
                "model.latent is attention with rotary positions, rmsnorm, no biases and no qk_norm: change those, "
                "or leave it out"
            )

    @property
    def value_dim(self) -> int:
        """Numbers of one head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Numbers of one head that are turned by position."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def shared_ffn(self) -> int:
        """Width of the MLP beside the experts; 0: there is none."""
        return self.experts.shared * self.experts.ffn if self.experts else 0

    def has_experts(self, block: int) -> bool:
        return self.experts is not None and block >= self.experts.dense_layers

    def block_params(self, block: int, *, active: bool = False) -> int:
        """Parameters of one block; `active`: those that one token meets, of all the experts only its own."""
        return self._count(block, active, matmul=False)

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
        return self._outside_params + self._all_blocks()

    @property
    def active_params(self) -> int:
        """Parameters that one token meets."""
        return self._outside_params + self._all_blocks(active=True)

    def block_matmul_params(self, block: int) -> int:
        """Parameters of one block that a token is multiplied with."""
        return self._count(block, active=True, matmul=True)

    def flops_per_token(self, seq: int, *, causal: bool) -> float:
        """Model FLOPs of training on one token: forward and backward, no recompute.

        6 per matmul parameter (head included, embedding lookup not), and 12·L·H·E·T for attention scores and values
        (PaLM, appendix B), of which half is that of values, and less where they are narrower. `causal` counts only the
        scores that the mask keeps: half of them, or, with a window W shorter than the sequence, W - W²/2T a token. Not
        causal, a window counts as W.
        """
        matmul = 6 * (self._all_blocks(active=True, matmul=True) + self.vocab * self.hidden)
        window = min(seq, self.sliding_window or seq)
        seen = window - window**2 / (2 * seq) if causal else window
        return matmul + 6 * self.num_layers * self.num_heads * (self.head_dim + self.value_dim) * seen

    @property
    def _outside_params(self) -> int:
        return self.embedding_params + self.norm_params + self.head_params

    def _all_blocks(self, *, active: bool = False, matmul: bool = False) -> int:
        dense = sum(not self.has_experts(block) for block in range(self.num_layers))
        first, last = (self._count(block, active, matmul) for block in (0, self.num_layers - 1))
        return first * dense + last * (self.num_layers - dense)

    def _count(self, block: int, active: bool, matmul: bool) -> int:
        """Parameters of a block, or of its matrices alone."""
        sizes = [(name, prod(dims)) for name, dims in block_sizes(self, block).items() if len(dims) > 1 or not matmul]
        routed = sum(size for name, size in sizes if name.startswith("mlp.experts."))
        met = routed * self.experts.per_token // self.experts.num_experts if active and self.experts else routed
        return sum(size for _, size in sizes) - routed + met


FAMILY_SWITCHES: dict[str, dict] = {
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "activation": "gelu",
        "qkv_bias": True, "out_bias": True, "tied": True,
    },
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0},
    "mixtral": {"rope_theta": 1_000_000.0},
    "qwen3_moe": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0},
    "deepseek_v2": {"norm_eps": 1e-6},
    "deepseek_v3": {"norm_eps": 1e-6},
}  # fmt: skip
"""What each family sets apart from Shape's own defaults."""
