"""Every parameter of a decoder, by name and size, without building one. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.models.shape import Latent, Shape


EXPERT_MATRICES = ("gate", "up", "down")
"""A model holds each of these of all experts as one tensor, stacked by rows; by name, every expert's stands alone."""


def parameter_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → dims of each parameter of the whole model, in order. A tied head is not listed: it is `embed.weight`."""
    sizes: dict[str, tuple[int, ...]] = {"embed.weight": (shape.vocab, shape.hidden)}
    if shape.positions == "learned":
        sizes["positions.weight"] = (shape.max_seq, shape.hidden)
    for block in range(shape.num_layers):
        sizes |= {f"blocks.{block}.{name}": dims for name, dims in block_sizes(shape, block).items()}
    sizes |= _norm("norm", shape)
    if not shape.tied:
        sizes["head.weight"] = (shape.vocab, shape.hidden)
    return sizes


def block_sizes(shape: Shape, block: int) -> dict[str, tuple[int, ...]]:
    """Name → dims of each parameter of one block, each expert's apart."""
    sizes = _norm("attention_norm", shape)
    sizes |= _latent_attention(shape, shape.latent) if shape.latent else _attention(shape)
    sizes |= _norm("mlp_norm", shape)
    return sizes | (_experts(shape) if shape.has_experts(block) else _mlp(shape))


def buffer_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → dims of what a model keeps beside its parameters: no gradient, no share, fp32 always."""
    if shape.experts is None or not shape.experts.has_bias:
        return {}
    blocks = filter(shape.has_experts, range(shape.num_layers))
    return {f"blocks.{block}.mlp.router.bias": (shape.experts.num_experts,) for block in blocks}


def stored_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Everything of a model that a checkpoint holds."""
    return parameter_sizes(shape) | buffer_sizes(shape)


def is_stacked(parameter: str) -> bool:
    """Whether a parameter of the model holds a matrix of many experts: blocks.3.mlp.experts.gate"""
    return ".mlp.experts." in parameter and not parameter.endswith(".weight")


def expert_name(stacked: str, expert: int) -> str:
    """blocks.3.mlp.experts.gate → blocks.3.mlp.experts.5.gate.weight"""
    module, _, matrix = stacked.rpartition(".")
    return f"{module}.{expert}.{matrix}.weight"


def _attention(shape: Shape) -> dict[str, tuple[int, ...]]:
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = _linear("attention.q", query, shape.hidden, shape.qkv_bias)
    sizes |= _linear("attention.k", kv, shape.hidden, shape.qkv_bias)
    sizes |= _linear("attention.v", kv, shape.hidden, shape.qkv_bias)
    sizes |= _linear("attention.out", shape.hidden, query, shape.out_bias)
    if shape.qk_norm:
        sizes |= {f"attention.{name}_norm.weight": (shape.head_dim,) for name in ("q", "k")}
    return sizes


def _latent_attention(shape: Shape, latent: Latent) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    if latent.q_rank is not None:
        sizes |= _linear("attention.q_down", latent.q_rank, shape.hidden, bias=False)
        sizes["attention.q_norm.weight"] = (latent.q_rank,)
    sizes |= _linear("attention.q", shape.num_heads * shape.head_dim, latent.q_rank or shape.hidden, bias=False)
    sizes |= _linear("attention.kv_down", latent.kv_rank + latent.rope_dim, shape.hidden, bias=False)
    sizes["attention.kv_norm.weight"] = (latent.kv_rank,)
    sizes |= _linear("attention.kv", shape.num_heads * (latent.nope_dim + latent.value_dim), latent.kv_rank, bias=False)
    return sizes | _linear("attention.out", shape.hidden, shape.num_heads * latent.value_dim, bias=False)


def _mlp(shape: Shape) -> dict[str, tuple[int, ...]]:
    sizes = _linear("mlp.gate", shape.ffn, shape.hidden, shape.out_bias) if shape.activation == "swiglu" else {}
    sizes |= _linear("mlp.up", shape.ffn, shape.hidden, shape.out_bias)
    return sizes | _linear("mlp.down", shape.hidden, shape.ffn, shape.out_bias)


def _experts(shape: Shape) -> dict[str, tuple[int, ...]]:
    """`down` as the others: its rows are the ffn dim, see models/moe.py."""
    assert shape.experts is not None
    sizes = _linear("mlp.router", shape.experts.num_experts, shape.hidden, bias=False)
    for expert in range(shape.experts.num_experts):
        for name in EXPERT_MATRICES:
            sizes |= _linear(f"mlp.experts.{expert}.{name}", shape.experts.ffn, shape.hidden, bias=False)
    if shared := shape.shared_ffn:
        sizes |= _linear("mlp.shared.gate", shared, shape.hidden, bias=False)
        sizes |= _linear("mlp.shared.up", shared, shape.hidden, bias=False)
        sizes |= _linear("mlp.shared.down", shape.hidden, shared, bias=False)
    return sizes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return sizes | {f"{name}.bias": (rows,)} if bias else sizes


def _norm(name: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": (shape.hidden,)}
    return sizes | {f"{name}.bias": (shape.hidden,)} if shape.norm == "layernorm" else sizes
