"""The loss's kernels in Triton's interpreter, against the plain way; run by test_loss_kernels.py in a process of its own.

TRITON_INTERPRET=1 python loss_kernels.py
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.parallel import loss
from weft.parallel.loss import IGNORED

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3}
"""The interpreter's bf16 is not a GPU's."""
INF = float("inf")


def kernels(logits: Tensor, targets: Tensor, first: int, group: Any, wanted: bool) -> Tensor:
    """As `loss._losses`."""
    losses, peak, total = loss._fused_losses(logits, targets, first, group)
    if wanted:
        loss._differentiated(logits, targets, peak, total, torch.ones(()), first)
    return losses


def both(logits: Tensor, targets: Tensor, first: int = 0, group: Any = None) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradients, the plain way's and the kernels'."""
    found = []
    for way in (loss._losses, kernels):
        place = logits.new_zeros(len(logits), logits.shape[-1] + 3)[:, :-3]  # rows lie apart
        place.copy_(logits)
        losses = way(place, targets, first, group, wanted=True)
        assert not place.as_strided((len(logits), 3), place.stride(), logits.shape[-1]).any(), "between the rows"
        unchanged = logits.clone()
        assert torch.equal(way(unchanged, targets, first, group, wanted=False), losses) or losses.isnan().any()
        assert torch.equal(unchanged.nan_to_num(), logits.nan_to_num())
        found.append((losses, place))
    return found


def check(logits: Tensor, targets: Tensor, first: int = 0, group: Any = None) -> None:
    bound = BOUNDS[logits.dtype]
    for plain, found in zip(*both(logits, targets, first, group), strict=True):
        assert plain.dtype == found.dtype
        torch.testing.assert_close(found, plain, rtol=bound, atol=bound, equal_nan=True)


def numbers(*dims: int) -> Tensor:
    return 4 * torch.randn(dims, generator=torch.Generator().manual_seed(0))


def whole(dtype: torch.dtype, columns: int) -> None:
    logits, targets = numbers(6, columns).to(dtype), torch.arange(6) * 7 % columns
    targets[2] = IGNORED
    targets[4] = columns - 1
    check(logits, targets)
    targets[5] = columns + 3  # nobody's
    check(logits, targets)


def cut(dtype: torch.dtype) -> None:
    """The middle third of a vocabulary; the others' messages are worked out from the whole."""
    logits, targets = numbers(5, 33).to(dtype), torch.tensor([0, 11, 21, 22, IGNORED])
    logits[1] = -INF  # all of this share: and yet the row is a good one
    logits[1, 30] = 1.0
    exact = logits.float().clone().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    peak = exact.detach().amax(-1)
    weights = (exact.detach() - peak[:, None]).exp()
    others = torch.cat([weights[:, :11], weights[:, 22:]], 1).sum(-1)
    elsewhere = (targets >= 0) & ((targets < 11) | (targets >= 22))
    at_target = (exact.detach().gather(-1, targets.clamp(min=0)[:, None])[:, 0] - peak).masked_fill(~elsewhere, 0)

    def all_reduce(x: Tensor, op: Any = None, group: Any = None) -> None:
        x.copy_(peak) if x.dim() == 1 else x.add_(torch.stack((others, at_target)))

    loss.dist = SimpleNamespace(all_reduce=all_reduce, ReduceOp=torch.distributed.ReduceOp)  # type: ignore[assignment]
    check(logits[:, 11:22], targets, 11, "tp")
    share = logits[:, 11:22].contiguous()
    found = kernels(share, targets, 11, "tp", wanted=True)
    torch.testing.assert_close(found, losses.detach(), rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    assert exact.grad is not None
    torch.testing.assert_close(share.float(), exact.grad[:, 11:22], rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    loss.dist = torch.distributed


def no_numbers(dtype: torch.dtype) -> None:
    logits = numbers(7, 40).to(dtype)
    logits[0, 3], logits[1, 3], logits[2, 3], logits[3], logits[4, 20:] = INF, -INF, float("nan"), -INF, -INF
    logits[5, 39] = logits[6, 0] = float("nan")
    for targets in (torch.full((7,), 3), torch.tensor([1, 1, 1, 1, 1, IGNORED, 39])):
        check(logits, targets)


def sums() -> None:
    """What training calls, both forms of it."""
    loss.fused = lambda logits: True  # type: ignore[assignment]
    x, weight, targets = numbers(2, 5, 16), numbers(61, 16) / 4, torch.arange(10).view(2, 5)
    targets[1, 1] = IGNORED
    found = []
    for run in (
        lambda x, w: F.cross_entropy((x @ w.t()).flatten(0, 1), targets.flatten(), reduction="sum"),
        lambda x, w: loss.cross_entropy_sum(x @ w.t(), targets),
        lambda x, w: loss.linear_cross_entropy_sum(x, w, targets),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        total = run(*leaves)
        total.backward(torch.tensor(3.0))
        found.append((total.detach(), *(leaf.grad for leaf in leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def main() -> int:
    loss.TILE = 16
    for dtype in BOUNDS:
        for columns in (1, 5, 16, 50):
            whole(dtype, columns)
        cut(dtype)
        no_numbers(dtype)
    sums()
    print("right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
