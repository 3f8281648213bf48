"""Messages between the processes of this machine: how long each kind takes, and how much of it a computation hides."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from weft.parallel.collectives import all_gather_rows, all_to_all, reduce_scatter_rows
from weft.tune.clock import Clock
from weft.tune.measure import PRECISIONS, Found, Point, Sizes

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


class Messages:
    """The processes in groups of 2, 4, … and all together; every group talks at once, as those of a layout do."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, world = device, dist.get_rank(), dist.get_world_size()
        self.sizes = [size for power in range(1, 20) if (size := 2**power) < world and world % size == 0] + [world]
        self.work = torch.rand(256, 256, device=device), torch.rand(2**20, device=device)
        self.groups: dict[int, Any] = {}
        for size in self.sizes if world > 1 else []:
            for first in range(0, world, size):
                group = dist.new_group(list(range(first, first + size)))
                if first <= self.rank < first + size:
                    self.groups[size] = group

    def points(self, sizes: Sizes) -> Iterator[Point]:
        if not self.groups:
            return
        axes = (tuple(self.sizes), sizes.bytes)
        for precision, dtype in PRECISIONS.items():
            for kind in KINDS:
                for place in product(*axes):

                    def measure(
                        clock: Clock, kind: str = kind, precision: str = precision, dtype: torch.dtype = dtype,
                        place: tuple[int, int] = place,
                    ) -> Found:  # fmt: skip
                        numbers = max(place[0], place[1] // dtype.itemsize)
                        call = self.call(kind, numbers - numbers % place[0], dtype, self.groups[place[0]])
                        return {f"{kind}_{precision}": clock.time([call], shared=True, before=self.compute)}

                    yield Point((f"{kind}_{precision}",), axes, place, measure, shared=True)

    def compute(self) -> None:
        """A millisecond of work: in training no message follows another, those who talk have to be woken, and some come
        late."""
        matrix, numbers = self.work
        matrix @ matrix
        numbers + numbers

    def call(self, kind: str, numbers: int, dtype: torch.dtype, group: Any) -> Callable[[], object]:
        """One message, of so many numbers as plan/time/curves.py says."""
        ways = dist.get_world_size(group)
        whole = torch.ones(numbers, dtype=dtype, device=self.device)
        share = torch.ones(numbers // ways, dtype=dtype, device=self.device)
        if kind == "all_reduce":
            return partial(dist.all_reduce, torch.zeros_like(whole), group=group)
        if kind == "all_gather":
            return partial(all_gather_rows, share, group)
        if kind == "reduce_scatter":
            return partial(reduce_scatter_rows, whole, group)
        if kind == "all_to_all":
            return partial(all_to_all, whole.view(ways, -1), group)
        return partial(self.there_and_back, whole, torch.empty_like(whole), group)

    def there_and_back(self, out: Tensor, into: Tensor, group: Any) -> None:
        """To the next of the group, while the one before sends: both ways at once, as stages of a pipeline do."""
        ranks = dist.get_process_group_ranks(group)
        place = ranks.index(self.rank)
        sent = dist.isend(out, ranks[(place + 1) % len(ranks)], group=group)
        arrived = dist.irecv(into, ranks[place - 1], group=group)
        for work in (sent, arrived):
            assert work is not None
            work.wait()

    def beside(self, clock: Clock) -> float:
        """Of a message and a computation that go on at once, the share of the shorter that is hidden."""
        if not self.groups:
            return 0.0
        size = 256 if self.device.type == "cpu" else 4096
        x, w = torch.rand(2, size, size, device=self.device)
        message = torch.zeros(2**20 if self.device.type == "cpu" else 2**26, device=self.device)
        [alone] = _shortest(clock, lambda: dist.all_reduce(message))
        [one] = _shortest(clock, lambda: x @ w)
        times = max(1, round(alone / one))

        def compute() -> None:
            for _ in range(times):
                x @ w

        def both() -> None:
            work = dist.all_reduce(message, async_op=True)
            compute()
            assert work is not None
            work.wait()

        found = []
        for _ in range(3):
            first, second, together = _shortest(clock, lambda: dist.all_reduce(message), compute, both)
            found.append((first + second - together) / min(first, second))
        return min(1.0, max(0.0, statistics.median(found)))

    def unit(self, clock: Clock) -> float:
        """Seconds that FSDP2 takes to gather one of its units, or to reduce it, beside the message."""
        size, units = 16, 8
        model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(units)]).to(self.device)
        x = torch.rand(size, size, device=self.device)
        [plain] = _shortest(clock, lambda: model(x).sum().backward())
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        [sharded] = _shortest(clock, lambda: model(x).sum().backward())
        messages = 0.0
        if self.groups:
            [messages] = _shortest(clock, lambda: all_gather_rows(x, self.groups[self.sizes[-1]]))
        return max(0.0, (sharded - plain) / (3 * units) - messages)  # gathered twice, and reduced


def _shortest(clock: Clock, *works: Callable[[], object]) -> list[float]:
    """Seconds of each, of several turns."""
    return [min(min(clock.time([work], shared=True)) for _ in range(3)) for work in works]
