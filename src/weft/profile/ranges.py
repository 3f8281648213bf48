"""Ranges: names in a trace for the parts of a model and of a step, there only while a trace is taken.

A name is `weft:KIND:DETAIL`; profile/names.py reads them again. Modules get theirs by hooks, functions by a wrapper in
their place; both are gone when the capture ends, so a step that nobody looks at pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weft.profile.names import PREFIX

_MISSING = object()


@dataclass(frozen=True)
class Wrap:
    """A function to be named: `owner.name`, an object's, a class's or a module's.

    Attributes:
        kind: what it is called in the trace; or a function of its arguments that says it.
    """

    owner: Any
    name: str
    kind: str | Callable[..., str]


@dataclass
class Ranges:
    """Install with `begin`, take away with `end`.

    Args:
        modules: name → module; each one's forward pass is a range.
    """

    modules: Mapping[str, nn.Module]
    wraps: Sequence[Wrap]
    _handles: list[RemovableHandle] = field(default_factory=list)
    _before: list[tuple[Wrap, object]] = field(default_factory=list)

    def begin(self) -> None:
        for name, module in self.modules.items():
            open_: list[Any] = []  # a module may be entered again before it is left
            self._handles.append(module.register_forward_pre_hook(_opener(open_, name), prepend=True))
            self._handles.append(module.register_forward_hook(_closer(open_), always_call=True))
        for wrap in self.wraps:
            self._before.append((wrap, vars(wrap.owner).get(wrap.name, _MISSING)))
            setattr(wrap.owner, wrap.name, _ranged(getattr(wrap.owner, wrap.name), wrap.kind))

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        for wrap, before in reversed(self._before):
            if before is _MISSING:  # it was its class's, or its parent's
                delattr(wrap.owner, wrap.name)
            else:
                setattr(wrap.owner, wrap.name, before)
        self._handles.clear()
        self._before.clear()


def named(text: str) -> torch.autograd.profiler.record_function:
    """A range, as a context manager."""
    return torch.autograd.profiler.record_function(PREFIX + text)


def _opener(open_: list[Any], name: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple) -> None:
        open_.append(named(f"module:{name}"))
        open_[-1].__enter__()

    return enter


def _closer(open_: list[Any]) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple, result: object) -> None:
        open_.pop().__exit__(None, None, None)

    return leave


def _ranged(function: Callable[..., Any], kind: str | Callable[..., str]) -> Callable[..., Any]:
    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with named(kind if isinstance(kind, str) else kind(*args, **kwargs)):
            return function(*args, **kwargs)

    return inside
