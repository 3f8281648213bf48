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
from weft.models.moe import Experts, MoE
from weft.models.rope import frequencies
from weft.serve.kernels.native import DTYPES, kernel, library
from weft.serve.kernels.products import ServedLinear, most_ours
from weft.serve.steps.batch import Batch
from weft.serve.steps.cache import PagedCache, PagedLayer
from weft.serve.steps.store import Store

BOTH = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.out", "attention.q_norm",
    "attention.k_norm", "mlp_norm", "mlp.router",
)  # fmt: skip
PLAIN = (*BOTH, "mlp.gate", "mlp.up", "mlp.down")
WEIGHTS = {
    GeluMLP: PLAIN,
    SwigluMLP: PLAIN,
    MoE: (*BOTH, "mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"),
}
"""By the kind of its MLP, a block's weights in the order of `Block` in blocks.cpp; what it has not is null there."""

SEEN_AGAIN = 1 << 11
"""Places of a text that its tokens may look at one by one, all but the last: a kernel for many tokens looks once."""


class Step(ctypes.Structure):
    """`Step` in blocks.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "blocks", "sequences", "tokens", "hidden", "heads", "kv_heads", "head", "ffn", "block", "table", "window",
            "means", "experts", "per_token", "expert_ffn", "normed",
        )),
        *((name, ctypes.c_void_p) for name in ("counts", "ends", "tables", "frequencies")),
        ("eps", ctypes.c_float), ("turned", ctypes.c_float), ("scaling", ctypes.c_float), ("threads", ctypes.c_int),
    )  # fmt: skip


class Stack:
    """All blocks of a model, with the layers of a cache.

    Args:
        model: whose blocks `stackable` says yes to. Its weights stay where they are: their addresses are kept.
    """

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        shape = model.shape
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
        if (experts := shape.experts) is not None:
            self.step.experts, self.step.per_token = experts.num_experts, experts.per_token
            self.step.expert_ffn, self.step.normed = experts.ffn, experts.norm_topk
            self.step.scaling = experts.scaling
        pointers: list[int | None] = []
        for block, layer in zip(model.blocks.values(), cache.layers, strict=True):
            assert isinstance(block, Block)
            for name in WEIGHTS[type(block.mlp)]:
                pointers += [address(tensor) for tensor in matrix(block, name)]
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
    """Neither latent attention nor experts of DeepSeek's kind; nothing cut, and nothing added by an adapter."""
    assert isinstance(block, Block)
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return (
        type(block.attention) is Attention
        and type(block.mlp) in WEIGHTS
        and (not isinstance(block.mlp, MoE) or by_softmax(block.mlp))
        and all(type(module) is ServedLinear and "forward" not in vars(module) for module in linear)
    )


def by_softmax(mlp: MoE) -> bool:
    """Whether tokens go where softmax is largest, to experts that are whole here and nowhere else."""
    router, experts = mlp.router, mlp.router.experts
    simple = experts.scores == "softmax" and experts.groups == 1 and router.bias is None
    return simple and mlp.shared is None and type(mlp.experts) is Experts


def stores(layer: PagedLayer) -> list[Store]:
    return [store for store in (layer.keys, layer.values) if isinstance(store, Store)]


def matrix(block: Block, name: str) -> tuple[Tensor | None, Tensor | None]:
    """The weight and the bias of this name; what the block has not is None."""
    found: nn.Module | Tensor | None = block
    for step in name.split("."):
        found = getattr(found, step, None)
    if isinstance(found, nn.Module):
        return getattr(found, "weight", None), getattr(found, "bias", None)
    return found, None


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
