"""LoRA adapters (Hu et al., 2021): many fine-tuned models beside one copy of the weights.

An adapter adds a product of two thin matrices to some of the model's own: W x becomes W x + B (A x). Each sequence of a
batch may have another, so what they add is worked out for the rows of one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.checkpoint.adapter import Pair, load_adapter
from weft.models.cuts import cut_dim, even_split
from weft.models.decoder import Decoder
from weft.parallel.numbered import found, number_of
from weft.parallel.tensor import RowLinear
from weft.serve.steps.batch import Batch


class Adapted:
    """What the adapters add to the products of one matrix."""

    def __init__(self) -> None:
        self.pairs: dict[int, Pair] = {}
        self.rows: list[tuple[int, Tensor | None]] = []
        self.number = number_of(self)

    def attach(self, module: nn.Linear) -> None:
        """From now on the module's products have it. Of a matrix cut by columns, its share's, before they are summed."""
        method = "product" if isinstance(module, RowLinear) else "forward"
        plain = getattr(module, method)
        setattr(module, method, lambda x: self.add(x, plain(x)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x [1, N, I], y [1, N, O] → y."""
        if torch.compiler.is_compiling():
            apart: Tensor = torch.ops.weft.adapted(x, y, self.number)
            return apart
        for number, rows in self.rows:
            if (pair := self.pairs.get(number)) is None:
                continue
            a, b = pair
            if rows is None:
                y = y + x @ a.t() @ b.t()
            else:
                y = y.index_add(1, rows, x[:, rows] @ a.t() @ b.t())
        return y


class Adapters:
    """All adapters of a model, or of this process's share of it.

    Args:
        folders: name → directory, as `checkpoint/adapter.py` reads it. They are numbered from 1; 0 is the model as it is.

    Raises:
        ValueError: as `load_adapter`.
    """

    def __init__(self, model: Decoder, folders: Mapping[str, Path], group: dist.ProcessGroup | None = None) -> None:
        self.sites: dict[str, Adapted] = {}
        first = next(iter(model.parameters()))
        self.device, self.count = first.device, len(folders)
        self.held = held = dict(model.named_modules())
        loaded = [load_adapter(folder, model.shape) for folder in folders.values()]
        kinds = {kind_of(name) for pairs in loaded for name in pairs}
        for name, module in held.items():  # blocks are compiled as one: all have it, or none
            if kind_of(name) in kinds:
                assert isinstance(module, nn.Linear)
                self.sites[name] = Adapted()
                self.sites[name].attach(module)
        for number, pairs in enumerate(loaded, start=1):
            for name in pairs.keys() & self.sites.keys():  # the others are another stage's
                a, b = pairs[name] if group is None else share(name, pairs[name], group)
                self.sites[name].pairs[number] = (a.to(first), b.to(first))

    def begin(self, batch: Batch) -> None:
        """Make ready for a step."""
        self._set(self._rows(batch.adapters, batch.counts))

    def use(self, number: int) -> None:
        """From now on, all tokens have this one."""
        self._set([(number, None)])

    def matrices(self, name: str) -> dict[int, Tensor]:
        """By adapter, a module's matrix with what that adds, for one that is no product of tokens: a copy for each adapter
        that changes it. Empty where none does."""
        if (site := self.sites.get(name)) is None:
            return {}
        weight = self.held[name].weight.detach()
        changed = {number: (weight + (b.float() @ a.float())).to(weight) for number, (a, b) in site.pairs.items()}
        return {number: changed.get(number, weight) for number in range(1 + self.count)}

    def _set(self, rows: list[tuple[int, Tensor | None]]) -> None:
        for site in self.sites.values():
            site.rows = rows

    def _rows(self, numbers: list[int], counts: list[int]) -> list[tuple[int, Tensor | None]]:
        """Each adapter's number, and the places of its tokens; None: all of them."""
        if len(set(numbers)) == 1:
            return [(numbers[0], None)]
        each = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        return [(number, (each == number).nonzero()[:, 0].to(self.device)) for number in sorted(set(numbers) - {0})]


def kind_of(name: str) -> str:
    """A module's name, the same in every block."""
    return re.sub(r"^blocks\.\d+\.", "blocks.", name)


def _adapted(x: Tensor, y: Tensor, number: Tensor) -> Tensor:
    one: Adapted = found(number)
    added = one.add(x, y)
    return y.clone() if added is y else added


_LIBRARY = torch.library.Library("weft", "FRAGMENT")
_LIBRARY.define("adapted(Tensor x, Tensor y, Tensor number) -> Tensor")
_LIBRARY.impl("adapted", _adapted, "CompositeExplicitAutograd")
torch.library.register_fake("weft::adapted", lambda x, y, _: torch.empty_like(y), lib=_LIBRARY)


def share(name: str, pair: Pair, group: dist.ProcessGroup) -> Pair:
    """This process's part of a pair, cut as its matrix is: B by rows, or A by columns."""
    a, b = pair
    dim = cut_dim(f"{name}.weight")
    if dim == 0:
        start, stop = even_split(len(b), group.size(), group.rank())
        return a, b[start:stop]
    if dim == 1:
        start, stop = even_split(a.shape[1], group.size(), group.rank())
        return a[:, start:stop], b
    return pair
