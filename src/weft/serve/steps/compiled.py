"""The step's code between the attentions, compiled (`EngineConfig.compile`): one function for all blocks of a model.

torch's compiler makes one kernel of what stands between two products. What it does not look into is one operation each:
attention over the paged cache, which is another with every batch, as is what adapters add, and on a CPU the products, which
choose their own way (`kernels/products.py`). Experts are left as they are, between two functions. A step of one token has a
function of its own; all others share one, for any number of tokens. What was compiled is kept where torch keeps it: in
`$TORCHINDUCTOR_CACHE_DIR`, or in `torchinductor_USER` in the folder for temporary files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from weft.models.attention import LayerCache
from weft.models.decoder import Block, Decoder
from weft.models.latent import LatentAttention, LatentCache, Look
from weft.models.moe import MoE
from weft.parallel.numbered import found, number_of
from weft.serve.kernels.native import find_compiler
from weft.serve.steps.cache import LatentLayer, PagedLayer

Forward = Callable[..., Tensor]


class ApartLayer:
    """A layer of the cache whose attention is one operation. Implements models/attention.py's LayerCache."""

    def __init__(self, layer: PagedLayer) -> None:
        self.layer, self.number = layer, number_of(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        y: Tensor = torch.ops.weft.paged_attend([q, k, v], self.number, v.shape[-1], scale)
        return y

    def run(self, row: list[Tensor], scale: float | None) -> Tensor:
        q, k, v = row
        return self.layer.attend(q, k, v, scale)


class ApartLatentLayer:
    """The same of latent attention. Implements models/latent.py's LatentCache.

    Args:
        attention: whose queries look at it.
    """

    def __init__(self, layer: LatentLayer, attention: LatentAttention) -> None:
        self.layer, self.look, self.number = layer, attention.look, number_of(self)
        self.width = attention.latent.value_dim

    def attend(self, q: Tensor, latents: Tensor, look: Look) -> Tensor:
        y: Tensor = torch.ops.weft.paged_attend([q, latents], self.number, self.width, None)
        return y

    def run(self, row: list[Tensor], scale: float | None) -> Tensor:
        q, latents = row
        return self.layer.attend(q, latents, self.look)


Apart = ApartLayer | ApartLatentLayer


class CompiledBlock(Block):
    """Compiled where its cache stands apart; anywhere else it is what it was."""

    compiled: Forward

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | LatentCache | None = None,
    ) -> Tensor:
        if isinstance(cache, Apart):
            return self.compiled(self, x, rope, mask, cache)
        return super().forward(x, rope, mask, cache)


def compile_step(model: Decoder, layers: Sequence[PagedLayer | LatentLayer]) -> list[Apart]:
    """Have a model's blocks compiled, when they are first called, for the layers of the cache that come back.

    Raises:
        ValueError: the model is on a CPU, and there is no C++ compiler.
    """
    if next(iter(model.parameters())).device.type == "cpu" and find_compiler() is None:
        raise ValueError(
            "compile: on a CPU it needs a C++ compiler, and none of $CXX, g++, clang++ and c++ is here: install one, or "
            "leave compile out"
        )
    apart: list[Apart] = []
    functions: dict[type, Forward] = {}
    for block, layer in zip(model.blocks.values(), layers, strict=True):
        if not isinstance(block, CompiledBlock):
            mlp, fullgraph = block.mlp, True
            if isinstance(mlp, MoE):
                mlp.forward, fullgraph = torch.compiler.disable(mlp.forward), False  # type: ignore[method-assign]
            block.__class__ = CompiledBlock
            assert isinstance(block, CompiledBlock)
            block.compiled = functions.setdefault(type(mlp), compiled(fullgraph))
        if isinstance(layer, LatentLayer):
            assert isinstance(block.attention, LatentAttention)
            apart.append(ApartLatentLayer(layer, block.attention))
        else:
            apart.append(ApartLayer(layer))
    return apart


def compiled(fullgraph: bool) -> Forward:
    """The forward pass of any block of one kind, in one model: what torch compiles is kept by the code that it was, and no
    other model must find it, for nothing but sizes is looked at. So the code is a copy."""
    plain = Block.forward
    forward = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
    options: dict[str, Any] = {"guard_filter_fn": of_sizes}
    return torch.compile(forward, fullgraph=fullgraph, dynamic=True, options=options)


def of_sizes(guards: Sequence[Any]) -> list[bool]:
    """What is asked at every call. Of blocks of one kind in one model, in inference, nothing differs but the number of
    tokens; to look at every parameter, too, takes as long as compiling gains on a CPU."""
    sizes = {"SHAPE_ENV", "TENSOR_MATCH"}
    return [guard.guard_type in sizes and "_modules" not in guard.name for guard in guards]


def _attend(row: list[Tensor], number: Tensor, width: int, scale: float | None) -> Tensor:
    layer: Apart = found(number)
    return layer.run(row, scale).contiguous()


def _like_attend(row: list[Tensor], number: Tensor, width: int, scale: float | None) -> Tensor:
    return row[0].new_empty(*row[0].shape[:-1], width)


_LIBRARY = torch.library.Library("weft", "FRAGMENT")
_LIBRARY.define("paged_attend(Tensor[] row, Tensor number, SymInt width, float? scale) -> Tensor")
_LIBRARY.impl("paged_attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("weft::paged_attend", _like_attend, lib=_LIBRARY)
