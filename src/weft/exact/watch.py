"""Watch: sees every operation of a process, and takes down memory, messages and products.

The same for imagined tensors and for real ones: so what is imagined can be held against what happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from weft.exact.imagine import tree
from weft.exact.ledger import Ledger
from weft.exact.messages import Messages
from weft.exact.products import Products
from weft.models.decoder import Block, Decoder
from weft.parallel import context
from weft.parallel.woven import Woven

OPENED = {
    torch.ops.weft.context_attention.default: context._forward,
    torch.ops.weft.context_attention_backward.default: context._backward,
}
"""Operations of weft's own that are made of others."""


class Watch(TorchDispatchMode):
    """To be entered above everything that makes tensors.

    Attributes:
        device: whose memory is counted: cpu, though what runs on a GPU may be meant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.messages, self.products = Ledger(), Messages(), Products()
        self.inside: list[str] = []  # modules whose forward pass is under way
        self.behind = ""  # the module whose backward pass began last
        self.graph = -1  # the backward pass that is under way
        self.names: dict[int, str] = {}
        self.known: set[int] = set()  # parameters that tell when they have a gradient

    # -- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented
        self._turn()
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        again = self.graph != -1 and bool(self.inside)
        out = func(*args, **kwargs)
        self.products.see(func, args, kwargs, out, again)
        self.messages.see(func, args)
        for x in tree((out,)):
            if isinstance(x, Tensor) and not x.is_meta:
                self.ledger.see(x, self.module)
        return out

    @property
    def module(self) -> str:
        """The innermost one at work."""
        return self.inside[-1] if self.inside else self.behind

    def _turn(self) -> None:
        """A backward pass begins with its first operation, and ends before the first that is none of it."""
        graph = torch._C._current_graph_task_id()
        if graph != self.graph:
            self.graph = graph
            if graph != -1:
                self.ledger.begin("backward")
            else:
                self.behind = ""
                self.ledger.begin("between")

    # -- modules ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        if not self._depth():
            self.handles = [
                hooks.register_module_forward_pre_hook(self._enters),
                hooks.register_module_forward_hook(self._leaves, always_call=True),
            ]
            self.resize = torch.UntypedStorage.resize_
            torch.UntypedStorage.resize_ = _resizing(self)  # type: ignore[method-assign,assignment]
        self.depth = self._depth() + 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            for handle in self.handles:
                handle.remove()
            torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]

    def _depth(self) -> int:
        return getattr(self, "depth", 0)

    def follow(self, woven: Woven, block_done: Callable[[], None]) -> None:
        """Learn the names of a model's modules; `block_done` is told of each pass through a block, either way."""
        self.names = {id(module): name for name, module in woven.modules().items()}
        self.block_done = block_done

    def _enters(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, Decoder) and torch._C._current_graph_task_id() == -1:
            self.graph, self.behind = -1, ""
            self.ledger.begin("forward")
        self.inside.append(self.names.get(id(module), ""))

    def _leaves(self, module: nn.Module, args: Any, out: Any) -> None:
        name = self.inside.pop()
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in self.known:
                self.known.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._has_gradient)
            self.ledger.mark(parameter, "copies")
        if isinstance(out, Tensor) and out.requires_grad and name:
            out.register_hook(lambda _: self._backward_of(name))
        if isinstance(module, Block):
            self.block_done()

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark(parameter.grad, "gradients")

    def _backward_of(self, name: str) -> None:
        self.behind = name
        if name.count(".") == 1:
            self.block_done()


def _resizing(watch: Watch) -> Any:
    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        watch.resize(storage, size)
        watch.ledger.resized(storage, watch.module)

    return resize_
