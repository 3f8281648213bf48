"""The optimizer of a run: AdamW over what this process holds of the weights, or Muon for the matrices of the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.checkpoint.region import Piece, Region
from weft.config.tree import OptimizerConfig
from weft.parallel.mesh import Mesh
from weft.parallel.woven import Weight
from weft.train.eightbit import EightBitAdamW
from weft.train.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """torch's fused AdamW (Loshchilov and Hutter, 2019) on plain local tensors: however a weight is sharded, the update
    is elementwise. With `optimizer.kind = muon` the matrices of the blocks are Muon's. With `optimizer.states = 8bit` other
    matrices have moments of 8 bits.

    Matrices decay; norms and biases do not. The moments exist from the start, so memory is known before the first step.

    With `offload` AdamW works on the CPU (ZeRO-Offload, Ren et al., 2021): weights and gradients are copied there
    and the weights back. They are copied down in every step: whoever fills the weights need not know of the copies.
    """

    def __init__(
        self, weights: Sequence[Weight], config: OptimizerConfig, mesh: Mesh, *, offload: bool = False
    ) -> None:
        matrices = [weight for weight in weights if config.by_muon(weight.name, weight.data.shape)]
        self.muon = Muon(matrices, mesh, config.momentum, config.weight_decay) if matrices else None
        coarse = [weight for weight in weights if config.in_8bit(weight.name, weight.data.shape)]
        self.eightbit = EightBitAdamW(coarse, config.betas, config.eps, config.weight_decay)
        others = {id(weight) for weight in (*matrices, *coarse)}
        self.weights = [weight for weight in weights if id(weight) not in others]
        # the same memory as the weight, without the wrapping of whoever sharded it; or a copy to work on
        shares = [weight.data for weight in self.weights]
        self.tensors = [torch.nn.Parameter(_on_cpu(x) if offload else x) for x in shares]
        self.gradients = [_on_cpu(x) for x in shares] if offload else None
        decayed = [weight.data.dim() > 1 for weight in self.weights]
        groups = [
            {"params": [x for x, yes in zip(self.tensors, decayed, strict=True) if yes == group], "weight_decay": rate}
            for group, rate in ((True, config.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for x in self.tensors:
            step = torch.zeros((), dtype=torch.float32, device=x.device)
            self.adamw.state[x] = {"step": step} | {moment: torch.zeros_like(x) for moment in MOMENTS}

    def step(self, lr: float) -> None:
        """One update from the gradients that lie in the weights."""
        if self.gradients is not None:
            self._copy_down(self.gradients)
        for place, (x, weight) in enumerate(zip(self.tensors, self.weights, strict=True)):
            x.grad = weight.grad if self.gradients is None else self.gradients[place]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for x in self.tensors:
            x.grad = None
        if self.gradients is not None:
            for x, weight in zip(self.tensors, self.weights, strict=True):
                weight.data.copy_(x.detach(), non_blocking=True)
        self.eightbit.step(lr)
        if self.muon is not None:
            self.muon.step(lr)

    def _copy_down(self, gradients: list[Tensor]) -> None:
        for x, gradient, weight in zip(self.tensors, gradients, self.weights, strict=True):
            x.detach().copy_(weight.data, non_blocking=True)
            gradient.copy_(weight.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the CPU reads them next

    @property
    def updates(self) -> int:
        """Updates made so far: Adam's t."""
        return int(self.adamw.state[self.tensors[0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for x in self.tensors:
            self.adamw.state[x]["step"].fill_(count)
        self.eightbit.updates = count

    def tensors_kept(self) -> list[Tensor]:
        """What lies in memory from step to step: moments, as they are kept, and copies of what is updated elsewhere."""
        kept = [self.adamw.state[x][moment] for x in self.tensors for moment in MOMENTS]
        if self.gradients is not None:
            kept += [*self.tensors, *self.gradients]
        if self.muon is not None:
            kept += self.muon.moments
        coarse = [moment for moments in self.eightbit.moments for moment in moments.values()]
        return kept + [x for moment in coarse for x in (moment.codes, moment.scales)]

    def pieces(self) -> list[Piece]:
        """The moments of every weight, as tensors named `exp_avg.<weight>` and `exp_avg_sq.<weight>`, or, where it is
        Muon's, `momentum.<weight>`. Those of 8 bits come as copies in fp32, on the CPU: see `take`."""
        pieces = [
            Piece(_renamed(region, moment), self.adamw.state[x][moment][rows], weight.writes)
            for x, weight in zip(self.tensors, self.weights, strict=True)
            for region, rows in weight.parts
            for moment in MOMENTS
        ]
        if self.muon is not None:
            pieces += [
                Piece(_renamed(region, "momentum"), moment[rows], weight.writes)
                for weight, moment in zip(self.muon.weights, self.muon.moments, strict=True)
                for region, rows in weight.parts
            ]
        for weight, coarse in zip(self.eightbit.weights, self.eightbit.moments, strict=True):
            for name, moment in coarse.items():
                whole = moment.whole()
                pieces += [Piece(_renamed(region, name), whole[rows], weight.writes) for region, rows in weight.parts]
        return pieces

    def take(self, pieces: Sequence[Piece]) -> None:
        """Moments of 8 bits from what `pieces` gave, and somebody filled."""
        found = {piece.region: piece.data for piece in pieces}
        for weight, coarse in zip(self.eightbit.weights, self.eightbit.moments, strict=True):
            for name, moment in coarse.items():
                whole = torch.cat([found[_renamed(region, name)] for region, _ in weight.parts])
                moment.write(0, whole.to(weight.data.device).view(-1))


def _on_cpu(x: Tensor) -> Tensor:
    """A copy in memory that a GPU can reach without the CPU's help."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


def _renamed(region: Region, moment: str) -> Region:
    return Region(f"{moment}.{region.name}", region.sizes, region.start, region.stop)
