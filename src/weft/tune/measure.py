"""The operations of a training step, one by one, at the sizes that curves are made of.

Every operation is weft's own module, or the very call that it makes. Names are those that plan/time/counted.py reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.models.attention import attend
from weft.models.dtypes import DTYPES
from weft.models.moe import Order
from weft.models.norm import RMSNorm
from weft.models.rope import rotate
from weft.parallel.loss import cross_entropy_sum
from weft.train.step import squares
from weft.tune.clock import Clock

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "bf16")}
Axes = tuple[tuple[int, ...], ...]
Found = dict[str, list[float]]
"""Curve → times of one point of it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes at which curves are measured."""

    rows: tuple[int, ...]  # of a product
    columns: tuple[int, ...]  # of a product, and the depth of its sum
    numbers: tuple[int, ...]  # of an element-wise operation
    lengths: tuple[int, ...]  # of a sequence
    head_dims: tuple[int, ...]
    vocabs: tuple[int, ...]
    bytes: tuple[int, ...]  # of a message
    flops: float  # of the largest product


FULL = {
    "cpu": Sizes(
        rows=(16, 64, 256, 1024), columns=(64, 256, 1024, 4096), numbers=(2**12, 2**15, 2**17, 2**19, 2**21),
        lengths=(32, 128, 512, 2048), head_dims=(32, 64, 128), vocabs=(512, 4096, 32768),
        bytes=(2**12, 2**16, 2**19, 2**22, 2**25), flops=2**30,
    ),
    "cuda": Sizes(
        rows=(128, 1024, 4096, 16384), columns=(128, 512, 2048, 8192, 16384), numbers=(2**14, 2**18, 2**22, 2**28),
        lengths=(256, 1024, 4096, 16384), head_dims=(64, 128), vocabs=(8192, 32768, 131072),
        bytes=(2**14, 2**18, 2**22, 2**25, 2**28), flops=2**43,
    ),
}  # fmt: skip
QUICK = {
    "cpu": Sizes(
        rows=(64, 1024), columns=(64, 1024), numbers=(2**12, 2**18), lengths=(32, 256), head_dims=(16, 64),
        vocabs=(512, 4096), bytes=(2**12, 2**20), flops=2**27,
    ),
    "cuda": Sizes(
        rows=(512, 8192), columns=(512, 8192), numbers=(2**16, 2**27), lengths=(512, 4096), head_dims=(64, 128),
        vocabs=(8192, 65536), bytes=(2**16, 2**24), flops=2**41,
    ),
}  # fmt: skip
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward": lambda x, w, y: F.linear(x, w),
    "input": lambda x, w, y: y @ w,
    "weights": lambda x, w, y: y.t() @ x,
}
"""Of x [m, k], a matrix w [n, k] and the gradient y [m, n]."""
WIDTH = 256
"""Of the rows that norms and the like work on."""
EXPERTS = 8
"""Of the sort that is measured."""


@dataclass(frozen=True)
class Point:
    """One place on the curves of an operation.

    Attributes:
        names: of the curves that it is on.
        axes: theirs, all of them.
        place: which combination of the axes this is.
        flops: of a product; where that is more than what is measured, the time is told from a smaller one's.
        measure: times of each curve.
        shared: it is done by all processes together, so that waiting for each other is part of it.
    """

    names: tuple[str, ...]
    axes: Axes
    place: tuple[int, ...]
    measure: Callable[[Clock], Found]
    flops: float = 0.0
    shared: bool = False


def points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Everything that one process can measure, for each precision."""
    for precision, dtype in PRECISIONS.items():
        make = Maker(device, dtype, precision)
        yield from make.products(sizes)
        yield from make.elementwise(sizes)
        yield from make.attention(sizes)
        yield from make.losses(sizes)
    yield from Maker(device, torch.float32, "fp32").plain(sizes)


class Maker:
    """Makes the points of one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype, precision: str) -> None:
        self.device, self.dtype, self.precision = device, dtype, precision

    def rand(self, *dims: int, leaf: bool = False) -> Tensor:
        return torch.rand(dims, device=self.device, dtype=self.dtype).requires_grad_(leaf)

    def products(self, sizes: Sizes) -> Iterator[Point]:
        """x [m, k] with a matrix [n, k]: forward, and both gradients."""
        axes = (sizes.rows, sizes.columns, sizes.columns)
        for m, n, k in sorted(product(*axes), key=lambda place: (place[0] * place[1] * place[2], place)):
            for way in PRODUCTS:

                def measure(clock: Clock, m: int = m, n: int = n, k: int = k, way: str = way) -> Found:
                    count = clock.copies(self.dtype.itemsize * (m * k + n * k + m * n))
                    given = [(self.rand(m, k), self.rand(n, k), self.rand(m, n)) for _ in range(count)]
                    works = [partial(PRODUCTS[way], *tensors) for tensors in given]
                    return {f"product_{way}_{self.precision}": clock.time(works)}

                yield Point((f"product_{way}_{self.precision}",), axes, (m, n, k), measure, 2.0 * m * n * k)

    def elementwise(self, sizes: Sizes) -> Iterator[Point]:
        width = WIDTH
        norm = RMSNorm(width, eps=1e-5).to(self.device, self.dtype)
        layer_norm = torch.nn.LayerNorm(width).to(self.device, self.dtype)

        def both(name: str, call: Callable[..., Tensor], inputs: int, *weights: Tensor) -> Iterator[Point]:
            names = (f"{name}_forward_{self.precision}", f"{name}_backward_{self.precision}")
            for numbers in sizes.numbers:

                def measure(clock: Clock, numbers: int = numbers) -> Found:
                    works = []
                    for _ in range(clock.copies(self.dtype.itemsize * numbers * (inputs + 1))):
                        leaves = [self.rand(1, numbers // width, width, leaf=True) for _ in range(inputs)]
                        works.append(lambda leaves=leaves: (call(*leaves), [*leaves, *weights]))
                    return dict(zip(names, clock.both_ways(works), strict=True))

                yield Point(names, (sizes.numbers,), (numbers,), measure)

        yield from both("rmsnorm", norm, 1, *norm.parameters())
        yield from both("layernorm", layer_norm, 1, *layer_norm.parameters())
        yield from both("swiglu", lambda gate, up: F.silu(gate) * up, 2)
        yield from both("gelu", lambda x: F.gelu(x, approximate="tanh"), 1)
        yield from both("rope", self.rotate, 1)
        yield from self.single("add", sizes.numbers, lambda n: (self.rand(n), self.rand(n)), torch.add)
        yield from self.single("copy", sizes.numbers, lambda n: (self.rand(n),), torch.clone)
        yield from self.single("rows", sizes.numbers, self.shuffled, lambda x, order: x[order])

    def rotate(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, -1))
        table = torch.ones(heads.shape[1], heads.shape[-1] // 2, device=self.device)
        return rotate(heads, (table, table))

    def shuffled(self, numbers: int) -> tuple[Tensor, Tensor]:
        x = self.rand(numbers // WIDTH, WIDTH)
        return x, torch.randperm(len(x), device=self.device)

    def single(
        self,
        name: str,
        numbers: tuple[int, ...],
        make: Callable[[int], tuple[Tensor, ...]],
        call: Callable[..., object],
    ) -> Iterator[Point]:
        name = f"{name}_{self.precision}"
        for size in numbers:

            def measure(clock: Clock, size: int = size) -> Found:
                inputs = [make(size) for _ in range(clock.copies(2 * self.dtype.itemsize * size))]
                return {name: clock.time([partial(call, *given) for given in inputs])}

            yield Point((name,), (numbers,), (size,), measure)

    def attention(self, sizes: Sizes) -> Iterator[Point]:
        """Causal, of one head of one sequence; measured of several at once."""
        names = (f"attention_forward_{self.precision}", f"attention_backward_{self.precision}")
        axes = (sizes.lengths, sizes.head_dims)
        for length, width in product(*axes):

            def measure(clock: Clock, length: int = length, width: int = width) -> Found:
                heads = 8 if self.device.type == "cpu" else 32
                works = []
                for _ in range(clock.copies(4 * self.dtype.itemsize * heads * length * width)):
                    leaves = [self.rand(1, length, heads, width).transpose(1, 2).requires_grad_() for _ in range(3)]
                    q, k, v = leaves
                    works.append(partial(attended, q, k, v))
                ways = clock.both_ways(works)
                return {name: [time / heads for time in times] for name, times in zip(names, ways, strict=True)}

            yield Point(names, axes, (length, width), measure)

    def losses(self, sizes: Sizes) -> Iterator[Point]:
        """Of one row of logits, as long as the vocabulary: the loss with its gradient."""
        name = f"loss_{self.precision}"
        for vocab in sizes.vocabs:

            def measure(clock: Clock, vocab: int = vocab) -> Found:
                rows = max(16, 2**20 // vocab) if self.device.type == "cpu" else 1024  # enough for every multiprocessor
                logits = self.rand(rows, vocab)
                targets = torch.zeros(rows, dtype=torch.long, device=self.device)

                def work() -> None:
                    # of what was written in its place the numbers are as good as others
                    cross_entropy_sum(logits.detach().requires_grad_(), targets)

                return {name: [time / rows for time in clock.time([work])]}

            yield Point((name,), (sizes.vocabs,), (vocab,), measure)

    def plain(self, sizes: Sizes) -> Iterator[Point]:
        """What is done with weights and gradients, in fp32; and the sorting of tokens by expert."""
        yield from self.single("fill", sizes.numbers, lambda n: (self.rand(n),), torch.zero_)
        yield from self.single("accumulate", sizes.numbers, lambda n: (self.rand(n), self.rand(n)), Tensor.add_)
        yield from self.single("scale", sizes.numbers, lambda n: (self.rand(n),), lambda x: x.mul_(1.0))
        yield from self.single("squares", sizes.numbers, lambda n: (self.rand(n),), lambda x: squares([x]))
        yield from self.single("lower", sizes.numbers, lambda n: (self.rand(n),), lambda x: x.to(torch.bfloat16))
        yield from self.single("adamw", sizes.numbers, self.updated, lambda optimizer: optimizer.step())  # type: ignore[arg-type]
        tokens = tuple(max(16, numbers // 64) for numbers in sizes.numbers)
        yield from self.single("sort", tokens, self.choices, lambda numbers: Order(numbers, EXPERTS, False))

    def updated(self, numbers: int) -> tuple[torch.optim.Optimizer]:
        weight = self.rand(numbers, leaf=True)
        weight.grad = self.rand(numbers)
        return (torch.optim.AdamW([weight], lr=1e-6, fused=True),)

    def choices(self, tokens: int) -> tuple[Tensor]:
        return (torch.randint(EXPERTS, (tokens, 2), device=self.device),)


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result, and what it has gradients for."""
    return attend(q, k, v, None), [q, k, v]
