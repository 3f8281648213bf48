"""One training step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.balance import Routing, move_biases, routing_of
from weft.parallel.loss import IGNORED
from weft.parallel.woven import Rows, Weight, Woven
from weft.train.optimizer import Optimizer
from weft.train.scaler import LossScaler


@dataclass(frozen=True)
class Found:
    """What a forward and backward pass has found; the same on every process. The gradients lie in the weights.

    Attributes:
        loss: mean over all target tokens of the global batch.
        grad_norm: of all gradients together, before clipping.
        stop: some process was asked to stop.
        profile: rank 0 was asked to take a trace.
        routing: where experts' tokens went; None: the model has none.
    """

    loss: float
    grad_norm: float
    stop: bool
    routing: Routing | None = None
    profile: bool = False

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    woven: Woven,
    optimizer: Optimizer,
    scaler: LossScaler,
    rows: Rows,
    *,
    lr: float,
    clip_norm: float,
    bias_speed: float = 0.0,
    stop_asked: bool = False,
    profile_asked: bool = False,
) -> Found:
    """Forward, backward, agree, clip, update. Nothing is updated unless loss and gradients are finite everywhere."""
    found = find_gradients(woven, scaler, rows, stop_asked, profile_asked)
    if found.finite:
        update(woven, optimizer, scaler, found, lr=lr, clip_norm=clip_norm, bias_speed=bias_speed)
    return found


def find_gradients(
    woven: Woven, scaler: LossScaler, rows: Rows, stop_asked: bool = False, profile_asked: bool = False
) -> Found:
    """Forward and backward over the global batch; gradients come times `scaler.scale`."""
    num_targets, num_stops, num_profiles = agree(woven, count_targets(rows), float(stop_asked), float(profile_asked))
    loss_sum = woven.train_pass(rows, scaler.scale / max(num_targets, 1), scaler.scale)
    loss, squares = agree_all(woven, loss_sum, squared_norm(woven.weights))
    grad_norm = math.sqrt(squares) / scaler.scale
    return Found(loss / max(num_targets, 1), grad_norm, num_stops > 0, routing_of(woven), num_profiles > 0)


def update(
    woven: Woven,
    optimizer: Optimizer,
    scaler: LossScaler,
    found: Found,
    *,
    lr: float,
    clip_norm: float,
    bias_speed: float = 0.0,
) -> None:
    scale_gradients(woven.weights, clip_factor(found.grad_norm, clip_norm) / scaler.scale)
    optimizer.step(lr)
    if found.routing is not None:
        move_biases(woven, found.routing, bias_speed)
    scaler.succeeded()


def eval_step(woven: Woven, rows: Rows) -> tuple[float, float]:
    """Summed loss and number of target tokens of a global batch, the same on every process."""
    (num_targets,) = agree(woven, count_targets(rows))
    loss_sum, _ = agree_all(woven, woven.eval_pass(rows), torch.zeros(()))
    return loss_sum, num_targets


def count_targets(rows: Rows) -> Tensor:
    return (rows.targets != IGNORED).sum()


def agree(woven: Woven, num_targets: Tensor, *flags: float) -> tuple[float, ...]:
    """Target tokens of the global batch, and how many processes raise each of the flags."""
    mesh = woven.mesh
    speaks = mesh.index("pp") == 0 and mesh.index("cp") == 0 and mesh.index("tp") == 0  # one process of each replica
    return _sums(mesh.device, num_targets if speaks else 0, *flags)


def agree_all(woven: Woven, loss_sum: Tensor, squares: Tensor) -> tuple[float, ...]:
    """The loss of the global batch, and the squared norm of all gradients."""
    return _sums(woven.mesh.device, loss_sum if woven.mesh.index("tp") == 0 else 0, squares)


def squared_norm(weights: list[Weight]) -> Tensor:
    """Of this process's gradients, each share counted on one process only."""
    own = [weight.grad for weight in weights if weight.writes]
    return squares(own) if own else torch.zeros(())


def squares(gradients: list[Tensor]) -> Tensor:
    """Sum of squares of all numbers of some tensors on one device, fp64: a handful of launches on a GPU."""
    if gradients[0].is_cuda:  # its norms are added up in trees
        return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).double().square().sum()
    return torch.stack([squares_by_rows(x) for x in gradients]).sum()


def squares_by_rows(x: Tensor, width: int = 4096) -> Tensor:
    """Sum of squares: norms of short rows, added up in fp64.

    torch's own norm adds a whole tensor up in fp32 on a CPU, and is off by a thousandth for the embedding of GPT-2.
    """
    flat = x.flatten()
    whole = len(flat) // width * width
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, width), dim=1)
    return rows.double().square().sum() + torch.linalg.vector_norm(flat[whole:]).double().square()


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What gradients are multiplied with so that their norm is at most `clip_norm`; 0: no clipping."""
    return min(1.0, clip_norm / (grad_norm + 1e-6)) if clip_norm > 0 else 1.0


def scale_gradients(weights: list[Weight], factor: float) -> None:
    if factor != 1.0:
        torch._foreach_mul_([weight.grad for weight in weights], factor)


def _sums(device: torch.device, *values: Tensor | float) -> tuple[float, ...]:
    """Totals of some numbers over all processes, in one message."""
    packed = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(packed)
    return tuple(packed.tolist())
