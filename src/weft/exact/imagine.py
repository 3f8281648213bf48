"""Imagine: operations give tensors that have a size and no numbers, and messages arrive that nobody sent.

Everything is as large as it would be, on as many processes as the layout takes, in one process and in next to no memory:
torch's FakeTensor, on a process group that has its rank and its size and nobody else in it. Whole numbers that few tensors
hold are real, for sizes follow from them. Those that data decide are made up: each expert gets as many tokens as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten, network = torch.ops.aten, torch.ops._c10d_functional

WHOLE = (torch.int32, torch.int64, torch.bool)
FEW = 2048
"""Whole numbers that a tensor may have and still be real; or as many as there are processes."""


@contextmanager
def imagined(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world`, and what it computes takes no memory."""
    assert not dist.is_initialized(), "this process is one of a real run already"
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, Imagine(fake, world):
            yield
    finally:
        dist.destroy_process_group()


class Imagine(TorchDispatchMode):
    """What FakeTensorMode, which is to be active below it, leaves open."""

    def __init__(self, fake: FakeTensorMode, world: int) -> None:
        super().__init__()
        self.fake, self.few = fake, max(FEW, world)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented
        if func.namespace == "c10d":
            return _sent(func, args)
        if func is network.all_to_all_single.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return _alike(args[0], args[3])
        if FakeTensor in types:
            if func is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 0
            if func is aten.bincount.default:
                with unset_fake_temporarily():
                    return _even(args[0].numel(), kwargs.get("minlength", args[2] if len(args) > 2 else 0))
            return func(*args, **kwargs)
        given = [x for x in tree(args) if isinstance(x, Tensor)]
        if not given:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.numel() and self._stays(out):  # none may become any
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            return out
        if any(x.is_meta for x in given):
            if kwargs.get("device") is not None:
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        return out if not isinstance(out, Tensor) or self._stays(out) else self.fake.from_tensor(out)

    def _stays(self, x: Tensor) -> bool:
        """Whether a tensor is real: on meta, or of few whole numbers."""
        return x.is_meta or (x.dtype in WHOLE and x.numel() <= self.few)


def tree(values: Any) -> Iterator[Any]:
    """What nested lists and tuples hold."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from tree(value)
        else:
            yield value


def _sent(func: Any, args: Any) -> Any:
    """A message is there as soon as it is sent."""
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    work = torch._C._distributed_c10d._create_work_from_future(done).boxed()  # type: ignore[attr-defined]
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _even(pairs: int, experts: int) -> Tensor:
    """As many pairs for each expert, or one more for the first ones."""
    return torch.tensor([pairs // experts + (expert < pairs % experts) for expert in range(experts)])


def _alike(x: Tensor, group: str) -> Tensor:
    """What a process gets of the others, if each has what this one has: their part for it."""
    me = dist.distributed_c10d._resolve_process_group(group).rank()  # type: ignore[attr-defined,arg-type]
    return x[me : me + 1].expand_as(x).contiguous()
