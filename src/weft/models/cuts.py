"""How the decoder may be cut over a tensor-parallel axis. Torch-free; read by parallel/tensor.py and by exporters."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

Cut = Literal["column", "row", "region", "vocab", "head", "table", "norm", "head_norm", "latent", "router", "experts"]

DECODER_CUTS: dict[str, Cut] = {
    "embed": "vocab",  # rows of the vocabulary
    "positions": "table",  # whole on every process; under sp each looks up its own part of the sequence
    "blocks.*.attention_norm": "norm",
    "blocks.*.attention": "region",  # the whole sequence in, a share of the heads inside, summed by the row matrix
    "blocks.*.attention.q": "column",
    "blocks.*.attention.k": "column",
    "blocks.*.attention.v": "column",
    "blocks.*.attention.q_norm": "head_norm",  # whole, but each process sees only its own heads
    "blocks.*.attention.k_norm": "head_norm",
    "blocks.*.attention.q_down": "latent",  # whole, as the vector that it gives, of which each process makes its heads
    "blocks.*.attention.kv_down": "latent",
    "blocks.*.attention.kv_norm": "latent",
    "blocks.*.attention.kv": "column",
    "blocks.*.attention.out": "row",
    "blocks.*.mlp_norm": "norm",
    "blocks.*.mlp": "region",
    "blocks.*.mlp.gate": "column",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
    "blocks.*.mlp.router": "router",  # whole; each process routes its own part of the tokens
    "blocks.*.mlp.experts": "experts",  # not cut over tp: see parallel/experts.py
    "blocks.*.mlp.shared": "region",
    "blocks.*.mlp.shared.gate": "column",
    "blocks.*.mlp.shared.up": "column",
    "blocks.*.mlp.shared.down": "row",
    "norm": "norm",
    "head": "head",  # rows of the vocabulary; the logits stay cut
}
"""Module name pattern → its role."""


def cut_of(module: str) -> Cut | None:
    """The role of a module in a tensor-parallel cut; None for one that has no parameters of its own."""
    return next((cut for pattern, cut in DECODER_CUTS.items() if _same_depth(module, pattern)), None)


def cut_dim(parameter: str) -> int | None:
    """The dim along which a parameter is cut over tp; None: whole on every process."""
    module, _, kind = parameter.rpartition(".")
    cut = cut_of(module)
    if cut in ("column", "vocab", "head"):
        return 0
    return 1 if cut == "row" and kind == "weight" else None


def partial_gradient(parameter: str, sp: bool) -> bool:
    """Whether each tp process has only its own share of a whole parameter's gradient, to be summed over the axis.

    So it is where a whole parameter meets only some heads, or only a part of the sequence, as many do under sp.
    """
    module, _, kind = parameter.rpartition(".")
    cut = cut_of(module)
    return cut in ("head_norm", "latent", "router") or (
        sp and (cut in ("norm", "table") or (cut == "row" and kind == "bias"))
    )


def even_split(size: int, ways: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` of `ways`, as even as can be; the earlier parts take what does not divide."""
    base, rest = divmod(size, ways)
    start = index * base + min(index, rest)
    return start, start + base + (index < rest)


def _same_depth(module: str, pattern: str) -> bool:
    return module.count(".") == pattern.count(".") and fnmatchcase(module, pattern)
