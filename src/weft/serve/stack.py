"""A model's blocks as one call: steps of a few tokens, on a CPU.

While a decoding step waits for its matrices to come from memory, whatever else it needs is driven out of the caches: an
operation of five microseconds takes a hundred between two products. A model has fifteen such operations a block. In
`kernels/blocks.cpp` they are one program of some pages, with the products and the attention that the engine has anyway.
The plain reference is the model's own code, `Decoder.body`, which does what is not taken here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from weft.models.attention import Attention
from weft.models.decoder import Block, Decoder
from weft.models.mlp import GeluMLP, SwigluMLP
from weft.models.rope import frequencies
from weft.serve.batch import Batch
from weft.serve.cache import PagedCache, PagedLayer
from weft.serve.native import DTYPES, kernel, library
from weft.serve.products import ServedLinear, most_ours
from weft.serve.store import Store

WEIGHTS = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.out", "attention.q_norm",
    "attention.k_norm", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down",
)  # fmt: skip
"""A block's modules, in the order of `Block` in blocks.cpp."""

SEEN_AGAIN = 1 << 11
"""Places of a text that its tokens may look at one by one, all but the last: a kernel for many tokens looks once."""


class Step(ctypes.Structure):
    """`Step` in blocks.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "sequences", "tokens", "hidden", "heads", "kv_heads", "head",
                                              "ffn", "block", "table", "window", "means")),
        *((name, ctypes.c_void_p) for name in ("counts", "ends", "tables", "frequencies")),
        ("eps", ctypes.c_float), ("turned", ctypes.c_float), ("threads", ctypes.c_int),
    )  # fmt: skip


class Stack:
    """
    Args:
        model: whose blocks `stackable` says yes to. Its weights stay where they are: their addresses are kept.
    """

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.cache, shape = cache, model.shape
        first = next(iter(model.blocks.parameters()))
        self.run: Callable[..., None] = kernel("blocks", first.dtype)
        self.most = most_ours(first.dtype)
        self.frequencies = frequencies(shape, first.device).contiguous() if shape.positions == "rotary" else None
        self.step = Step(
            blocks=len(model.blocks), hidden=shape.hidden, heads=shape.num_heads, kv_heads=shape.num_kv_heads,
            head=shape.head_dim, ffn=shape.ffn, block=cache.block, window=cache.window or 0,
            means=shape.norm != "rmsnorm", eps=shape.norm_eps, turned=shape.yarn.rotated_scale if shape.yarn else 1,
            frequencies=address(self.frequencies),
        )  # fmt: skip
        pointers: list[int | None] = []
        for block, layer in zip(model.blocks.values(), cache.layers, strict=True):
            for name in WEIGHTS:
                module = part(block, name)
                pointers += [address(getattr(module, kind, None)) for kind in ("weight", "bias")]
            assert isinstance(layer, PagedLayer)
            pointers += [address(store.rows) for store in stores(layer)]
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)

    def takes(self, batch: Batch) -> bool:
        """Whether it has so few tokens that our own products are the fastest, and no long text has many of them."""
        again = sum((count - 1) * end for count, end in zip(batch.counts, batch.ends, strict=True))
        return len(batch.tokens) <= self.most and again <= SEEN_AGAIN

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Hidden states of a batch's tokens before all blocks, [1, N, D], → behind them. Keys and values are kept."""
        x = x.clone(memory_format=torch.contiguous_format)
        longest = max(map(len, batch.tables))
        rows = torch.tensor([batch.counts, batch.ends])
        tables = torch.tensor([table + [0] * (longest - len(table)) for table in batch.tables])
        step = self.step
        step.sequences, step.tokens, step.table = len(batch.counts), len(batch.tokens), longest
        step.counts, step.ends, step.tables = rows[0].data_ptr(), rows[1].data_ptr(), tables.data_ptr()
        step.threads = torch.get_num_threads()
        self.run(self.pointers, x.data_ptr(), ctypes.byref(step))
        return x


def stackable(model: Decoder, cache: PagedCache) -> bool:
    """Whether blocks are plain ones, whole on this process, in a dtype of the kernels; keys and values lie as they came."""
    parameters = list(model.blocks.parameters())
    dtypes = {parameter.dtype for parameter in parameters}
    return (
        len(dtypes) == 1
        and dtypes <= DTYPES.keys()
        and all(parameter.device.type == "cpu" and parameter.is_contiguous() for parameter in parameters)
        and all(plain(block) for block in model.blocks.values())
        and all(isinstance(layer, PagedLayer) and len(stores(layer)) == 2 for layer in cache.layers)
        and library() is not None
    )


def plain(block: nn.Module) -> bool:
    """No experts, no latent attention, nothing cut and nothing added by an adapter."""
    assert isinstance(block, Block)
    matrices = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return (
        type(block.attention) is Attention
        and type(block.mlp) in (GeluMLP, SwigluMLP)
        and all(type(module) is ServedLinear and "forward" not in vars(module) for module in matrices)
    )


def stores(layer: PagedLayer) -> list[Store]:
    return [store for store in (layer.keys, layer.values) if isinstance(store, Store)]


def part(block: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; None: the block has none."""
    for step in name.split("."):
        found = getattr(block, step, None)
        if found is None:
            return None
        block = found
    return block


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
