"""Parts of a step alone, forward and backward, for benchmarks/gpu.py: each beside its plain form, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.models.attention import attend
from weft.models.moe import Experts
from weft.models.shape import Shape
from weft.parallel.fp8 import Fp8Products, fp8_linear
from weft.parallel.loss import cross_entropy_sum, linear_cross_entropy_sum

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Work = Callable[[], None]


@dataclass(frozen=True)
class Part:
    """One forward and backward pass of a part.

    Attributes:
        flops: of its matrix products, those of backward too; attention's without the masked half.
    """

    work: Work
    flops: float


def experts(shape: Shape, tokens: int, device: torch.device) -> Part:
    """A layer of experts in bf16, each with as many rows as the others: grouped products, without router and order."""
    assert shape.experts is not None
    layer = Experts(shape).to(device, torch.bfloat16)
    rows = tokens * shape.experts.per_token
    x, grad = numbers(rows, shape.hidden, device=device), numbers(rows, shape.hidden, device=device)
    counts = torch.full((shape.experts.num_experts,), rows // shape.experts.num_experts, device=device)
    counts[0] += rows - int(counts.sum())
    scale = torch.ones(rows, device=device, dtype=torch.bfloat16)
    flops = 3 * 3 * 2 * rows * shape.hidden * shape.experts.ffn
    return Part(backward_of(lambda: layer.compute(x, scale, counts), grad, [x, *layer.parameters()]), flops)


def linear(shape: Shape, tokens: int, device: torch.device, kind: str) -> Part:
    """The widest matrix of a block: `bf16`, `fp8` or `fp8row`; with `.compile`, compiled."""
    x, grad = numbers(tokens, shape.hidden, device=device), numbers(tokens, shape.ffn, device=device)
    weight = numbers(shape.ffn, shape.hidden, device=device)
    form, _, compiled = kind.partition(".")
    product = F.linear if form == "bf16" else fp8_linear
    product = torch.compile(product, dynamic=False) if compiled else product
    arguments = (x, weight) if form == "bf16" else (x, weight, Fp8Products(by_row=form == "fp8row"))
    flops = 3 * 2 * tokens * shape.hidden * shape.ffn
    return Part(backward_of(lambda: product(*arguments), grad, [x, weight]), flops)


def loss(shape: Shape, tokens: int, device: torch.device, kind: str) -> Part:
    """Head and cross-entropy: from `whole` logits, or `chunked`."""
    x, weight = numbers(1, tokens, shape.hidden, device=device), numbers(shape.vocab, shape.hidden, device=device)
    targets = torch.arange(tokens, device=device).view(1, -1) % shape.vocab

    def whole() -> Tensor:
        return cross_entropy_sum(F.linear(x, weight), targets)

    def chunked() -> Tensor:
        return linear_cross_entropy_sum(x, weight, targets)

    flops = 3 * 2 * tokens * shape.hidden * shape.vocab
    grad = torch.ones((), device=device)
    return Part(backward_of({"whole": whole, "chunked": chunked}[kind], grad, [x, weight]), flops)


def attention(shape: Shape, tokens: int, device: torch.device, backend: str) -> Part:
    """Causal attention of one sequence, by one of torch's kernels. On a CPU, whichever there is."""
    q = numbers(1, shape.num_heads, tokens, shape.head_dim, device=device)
    k, v = (numbers(1, shape.num_kv_heads, tokens, shape.head_dim, device=device) for _ in range(2))
    grad = torch.ones_like(q)

    def forward() -> Tensor:
        if device.type != "cuda":
            return attend(q, k, v, None)
        with sdpa_kernel(BACKENDS[backend]):
            return attend(q, k, v, None)

    flops = 3.5 * 2 * tokens * tokens * shape.num_heads * shape.head_dim  # backward takes five products of two
    return Part(backward_of(forward, grad, [q, k, v]), flops)


def backward_of(forward: Callable[[], Tensor], grad: Tensor, leaves: list[Tensor]) -> Work:
    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(grad)

    return work


def numbers(*sizes: int, device: torch.device) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
