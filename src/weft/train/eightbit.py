"""AdamW whose moments take 8 bits a number: block-wise quantized (Dettmers et al., 8-bit Optimizers, 2021).

Each run of 256 numbers has a scale, its largest, and every number the code of the nearest value on a map whose steps grow
with the value: so the small ones keep some digits beside the large. The update itself is worked out in fp32.

Of the second moment the root is kept, and nothing that is above zero becomes zero: squares of gradients are twice as many
decades apart as the gradients, and where one were lost beside a first moment that is not, the next update would divide by
nothing.

The map here has both ends, -1 and 1. The largest of a block is kept exactly for that, and quantizing what was read gives
the same bits again: checkpoints hold plain fp32 moments, load under any layout, with 8 bits or without, and a resumed run
is bitwise the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.parallel.woven import Weight

BLOCK = 256
"""Numbers that share a scale."""
AT_ONCE = 2**22
"""Numbers that the update is worked out for at once, in fp32."""
TINY = 1e-12
"""The least scale: below it, a block is as good as zero; and squares of what can be told from zero are numbers in fp32."""


class EightBitAdamW:
    """Loshchilov and Hutter (2019), algorithm 2, over matrices; all of them decay."""

    def __init__(self, weights: Sequence[Weight], betas: tuple[float, float], eps: float, decay: float) -> None:
        self.weights, self.betas, self.eps, self.decay = weights, betas, eps, decay
        self.updates = 0
        self.moments = [{"exp_avg": Moment(w.data), "exp_avg_sq": Moment(w.data, square=True)}
                        for w in weights]  # fmt: skip

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients that lie in the weights."""
        self.updates += 1
        beta1, beta2 = self.betas
        bias1, bias2 = 1 - beta1**self.updates, 1 - beta2**self.updates
        for weight, moments in zip(self.weights, self.moments, strict=True):
            numbers, gradients = weight.data.view(-1), weight.grad.reshape(-1)
            for start in range(0, len(numbers), AT_ONCE):
                x, grad = numbers[start : start + AT_ONCE], gradients[start : start + AT_ONCE]
                mean = moments["exp_avg"].read(start, len(x)).lerp_(grad, 1 - beta1)
                square = moments["exp_avg_sq"].read(start, len(x)).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                moments["exp_avg"].write(start, mean)
                moments["exp_avg_sq"].write(start, square)
                x.mul_(1 - lr * self.decay).addcdiv_(mean, square.div_(bias2).sqrt_().add_(self.eps), value=-lr / bias1)


class Moment:
    """Numbers of the shape of `like`, zeros at first: a code for each, and a scale for each block of them as they lie.

    Args:
        square: they are squares, and what is kept is their roots.
    """

    def __init__(self, like: Tensor, square: bool = False) -> None:
        self.shape, self.square = like.shape, square
        self.map = code_map(signed=not square).to(like.device)
        self.middles = (self.map[1:] + self.map[:-1]) / 2
        blocks = -(-like.numel() // BLOCK)
        zero = int(torch.searchsorted(self.map, 0.0))
        self.codes = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=like.device)
        self.scales = torch.zeros(blocks, 1, device=like.device)

    def read(self, start: int, count: int) -> Tensor:
        """`count` numbers from `start` on, which is a multiple of BLOCK; fp32, [count]."""
        blocks = slice(start // BLOCK, -(-(start + count) // BLOCK))
        x = (self.map[self.codes[blocks].int()] * self.scales[blocks]).view(-1)[:count]
        return x.square_() if self.square else x

    def write(self, start: int, x: Tensor) -> None:
        """Numbers x [count] in the place of those from `start` on."""
        rows = F.pad(x.sqrt() if self.square else x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
        blocks = slice(start // BLOCK, start // BLOCK + len(rows))
        scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=TINY)
        codes = torch.bucketize(rows / scales, self.middles, out_int32=True)
        self.codes[blocks] = (codes.maximum((rows > 0).int()) if self.square else codes).byte()
        self.scales[blocks] = scales

    def whole(self) -> Tensor:
        """All of them, fp32, in the shape that they stand for; on the CPU."""
        return self.read(0, self.shape.numel()).view(self.shape).cpu()


def code_map(signed: bool) -> Tensor:
    """Ascending values from -1, or 0, to 1 (dynamic tree quantization, Dettmers, 2016): seven decades, each with twice as
    many steps as the one below; 255 of them, fp32."""
    values = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        values.append(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat(values)
    positive[-1] = 1.0
    return torch.cat([-positive.flip(0) if signed else positive[:0], torch.zeros(1), positive]).float()
