"""Lowered: a model that computes in a low precision beside weights and gradients in fp32 (Micikevicius et al., 2018).

For weights that a process holds whole. Where they are sharded FSDP2 does the same, with hooks around every block, which
take a CPU longer than a GPU needs for the work of a small one. Here a pass begins with one copy of all weights, and each
gradient that comes is added to the one in fp32 at once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


class Lowered:
    """The parameters of the model become copies in `dtype`; what they were is kept here.

    Attributes:
        weights: fp32, by name, with their gradients. A tied matrix is there once.
        weight_of: parameter of the model → the weight that it is a copy of.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.weights = dict(model.named_parameters())
        copies = {weight: nn.Parameter(torch.empty_like(weight, dtype=dtype)) for weight in self.weights.values()}
        self.weight_of = {copy: weight for weight, copy in copies.items()}
        for copy, weight in self.weight_of.items():
            copy.register_post_accumulate_grad_hook(partial(_add, weight))
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, copies[weight])

    @torch.no_grad()
    def refresh(self) -> None:
        """Before a pass: the copies are of the weights as they are now."""
        torch._foreach_copy_([*self.weight_of], [*self.weight_of.values()])

    def collect(self) -> None:
        """After gradients that came without a backward pass."""
        for copy, weight in self.weight_of.items():
            _add(weight, copy)


@torch.no_grad()
def _add(weight: Tensor, copy: Tensor) -> None:
    """A copy's gradient to that of its weight; one that was put off comes later."""
    if copy.grad is None:
        return
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad.add_(copy.grad)
    copy.grad = None
