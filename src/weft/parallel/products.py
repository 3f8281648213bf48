"""Products: the three of a matrix, one forward and two backward, in the precision that the model computes in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Products:
    """Plain ones. Of a layer: x [..., I] its input, weight [O, I] its matrix, grad [..., O] the gradient of its output."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def of_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x."""
        return grad @ weight

    def of_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the weight."""
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)

    def add_of_weight(self, weight: nn.Parameter, grad: Tensor, x: Tensor) -> None:
        """Add the gradient of the weight to what it has."""
        if weight.grad is None:
            weight.grad = self.of_weight(grad, x)
        else:
            weight.grad.addmm_(grad.flatten(0, -2).t(), x.flatten(0, -2))


PLAIN = Products()
