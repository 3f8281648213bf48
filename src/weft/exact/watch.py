"""Watch: sees every operation of a process, and takes down memory, messages and products.

The same for imagined tensors and for real ones: so what is imagined can be held against what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as every
from torch.utils._python_dispatch import TorchDispatchMode

from weft.exact.imagine import tree
from weft.exact.ledger import Ledger
from weft.exact.messages import Messages
from weft.exact.products import Products
from weft.models.decoder import Block, Decoder
from weft.models.moe import Experts
from weft.parallel import context
from weft.parallel.woven import Woven

OPENED: dict[Any, Callable[..., Any]] = {
    torch.ops.weft.context_attention.default: context._forward,
    torch.ops.weft.context_attention_backward.default: context._backward,
}
"""Operations of weft's own that are made of others."""


@contextmanager
def watching() -> Iterator[Watch]:
    """Everything that is done inside is seen."""
    watch = Watch()
    resize, compute = torch.UntypedStorage.resize_, Experts.compute

    def resized(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        watch.ledger.resized(storage, watch.module)

    def computed(experts: Experts, *given: Tensor) -> Tensor:
        watch.inside.append(watch.names.get(id(experts), ""))
        try:
            return compute(experts, *given)
        finally:
            watch.inside.pop()

    handles = [
        every.register_module_forward_pre_hook(watch.enters),
        every.register_module_forward_hook(watch.leaves, always_call=True),  # recomputation breaks off where it is done
    ]
    try:
        # FSDP2 frees and makes gathered weights so, and that is no operation
        resizing = patch.object(torch.UntypedStorage, "resize_", resized)
        # and experts that are computed again by themselves are no module that is entered
        with resizing, patch.object(Experts, "compute", computed), watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


class Watch(TorchDispatchMode):
    """What is seen, and where in the model it is."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.messages, self.products = Ledger(), Messages(), Products()
        self.inside: list[str] = []  # modules whose forward pass is under way
        self.behind = ""  # the module whose backward pass began last
        self.graph = -1  # torch's number of the backward pass that is under way
        self.names: dict[int, str] = {}
        self.block_done: Callable[[], None] = lambda: None
        self.known: set[int] = set()  # parameters that tell when they have a gradient

    def follow(self, woven: Woven, block_done: Callable[[], None]) -> None:
        """Learn the names of a model's modules; `block_done` is told of each pass through a block, either way."""
        self.names = {id(module): name for name, module in woven.modules().items()}
        self.block_done = block_done

    @property
    def module(self) -> str:
        """The innermost one at work."""
        return self.inside[-1] if self.inside else self.behind

    # -- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        self._turn()
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        again = self.graph != -1 and bool(self.inside)
        out = func(*args, **kwargs)
        self.products.see(func, args, kwargs, again)
        self.messages.see(func, args)
        for x in tree((out,)):
            if isinstance(x, Tensor) and not x.is_meta:
                self.ledger.see(x, self.module)
        return out

    def _turn(self) -> None:
        """A backward pass begins with its first operation, and ends before the first that is none of it."""
        graph = torch._C._current_graph_task_id()
        if graph != self.graph:
            self.graph, self.behind = graph, ""
            self.ledger.begin("between passes" if graph == -1 else "backward")

    # -- modules ------------------------------------------------------------------------------------------------------

    def enters(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, Decoder) and torch._C._current_graph_task_id() == -1:
            self.graph, self.behind = -1, ""
            self.ledger.begin("forward")
        self.inside.append(self.names.get(id(module), ""))

    def leaves(self, module: nn.Module, args: Any, out: Any) -> None:
        name = self.inside.pop()
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                self._knows(parameter)
        if isinstance(out, Tensor) and out.requires_grad and name:
            out.register_hook(lambda _: self._backward_of(name, isinstance(module, Block)))
        if isinstance(module, Block):
            self.block_done()

    def _knows(self, parameter: nn.Parameter) -> None:
        """What FSDP2 has gathered has parameters of its own."""
        self.ledger.mark(parameter, "copies")
        if id(parameter) not in self.known and parameter.requires_grad:
            self.known.add(id(parameter))
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark(parameter.grad, "gradients")

    def _backward_of(self, name: str, is_block: bool) -> None:
        self.behind = name
        if is_block:
            self.block_done()
