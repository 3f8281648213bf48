"""Recompute: keep less of the forward pass and do that part again in backward (Chen et al., 2016).

Of what `keep-…` names, results stay that a backward pass has a use for. Where a block has others, nothing but their sizes
stays: the result of its last matrix, which is its own, and that of a matrix whose result goes into a message, where what
came of the message stays.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import weft.parallel.context  # noqa: F401 (defines weft.context_attention)
from weft.config.recompute import Recompute
from weft.models.decoder import Block
from weft.models.moe import MoE
from weft.parallel.tensor import RowLinear

aten, network = torch.ops.aten, torch.ops._c10d_functional

OPERATIONS = {
    "matmul": {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default},
    "attention": {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.weft.context_attention.default,
    },
    "network": {
        network.all_reduce.default,
        network.all_gather_into_tensor.default,
        network.reduce_scatter_tensor.default,
        network.all_to_all_single.default,
    },
}
"""What of a block may be kept. The rest is cheap to do again."""

Operations = frozenset[Any]


def recompute_blocks(blocks: nn.ModuleDict, recompute: Recompute, *, compiled: bool = False) -> None:
    """Wrap the forward pass of the blocks, or of their parts, that is to be computed again in backward.

    Args:
        compiled: they will be; then torch's own policy says what is kept, and the compiler what of that has no use.
    """
    modules = list(blocks.values())
    kept = Operations().union(*(OPERATIONS[name] for name in recompute.keeps))
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kept and compiled:
        # torch warns on every process of in-place operations, which a block has none of
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        policy = functools.partial(_policy, kept)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    elif kept:
        options["context_fn"] = functools.partial(keeping, kept)
    for index in recompute.blocks(len(modules)):
        if kept and not compiled:
            leave_out(modules[index], recompute.keeps)
        for module, method, function in _parts(modules[index], recompute.redone):
            setattr(module, method, functools.partial(checkpoint, function, **options))


class Halves(Block):
    """A block whose halves are calls of their own: what attention, and what the MLP, adds to the residual stream, each with
    its norm, and under sp with what gathers its input."""

    def forward(self, x: Tensor, rope: Any = None, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        x = x + self.mixed(x, rope, mask, cache)
        return x + self.fed(x)

    def mixed(self, x: Tensor, rope: Any, mask: Tensor | None, cache: Any) -> Tensor:
        return self.attention(self.attention_norm(x), rope, mask, cache)

    def fed(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(x))


def _parts(block: Any, redone: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, Callable[..., Tensor]]]:
    """Modules and their methods."""
    if not redone:
        yield block, "forward", block.forward
    elif redone != ("experts",):
        block.__class__ = Halves
    if "attention" in redone:
        yield block, "mixed", block.mixed
    if "mlp" in redone:
        yield block, "fed", block.fed
    if "experts" in redone and isinstance(block.mlp, MoE):
        experts = block.mlp.experts
        # no module is entered again: the class's method is looked up each time, for profiles and exact plans wrap it
        yield experts, "compute", lambda *given: type(experts).compute(experts, *given)


def _policy(kept: Operations, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


# -- what is kept -----------------------------------------------------------------------------------------------------


def keeping(kept: Operations) -> tuple[Keep, Give]:
    """For the two passes of one block: in the second, kept operations are not done again."""
    results: deque[Any] = deque()
    return Keep(kept, results), Give(kept, results)


class Keep(TorchDispatchMode):
    """In the first pass, results are kept, or nothing but their sizes, which a number in their place has."""

    useless: Operations = frozenset()
    """Operations whose results no backward pass needs, while a part of a block runs."""

    def __init__(self, kept: Operations, results: deque[Any]) -> None:
        super().__init__()
        self.kept, self.results = kept, results

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in self.kept:
            stays = _sizes_of if op in Keep.useless else Tensor.detach
            self.results.append(tree_map_only(Tensor, stays, result))
        return result


class Give(TorchDispatchMode):
    """In the second pass, they come back in their order."""

    def __init__(self, kept: Operations, results: deque[Any]) -> None:
        super().__init__()
        self.kept, self.results = kept, results

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.results.popleft() if op in self.kept else op(*args, **(kwargs or {}))


def _sizes_of(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


def leave_out(block: nn.Module, keeps: tuple[str, ...]) -> None:
    """Tell the matrices at the ends of a block's two halves what of their results has no use."""
    everything = Operations().union(*OPERATIONS.values())
    out = block.get_submodule("attention.out")
    if isinstance(out, RowLinear) and "network" in keeps:
        _while_it_runs(out, Operations(OPERATIONS["matmul"]))
    if not isinstance(block.get_submodule("mlp"), MoE):
        _while_it_runs(block.get_submodule("mlp.down"), everything)


def _while_it_runs(module: nn.Module, useless: Operations) -> None:
    forward: Callable[[Tensor], Tensor] = module.forward

    def run(x: Tensor) -> Tensor:
        with _useless(useless):
            return forward(x)

    module.forward = run


@contextmanager
def _useless(operations: Operations) -> Iterator[None]:
    before, Keep.useless = Keep.useless, operations
    try:
        yield
    finally:
        Keep.useless = before
