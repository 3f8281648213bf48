"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024), scaled as in Moonlight (Liu et al., 2025).

The update needs the whole matrix. Each is sent to one process of its pipeline stage, its owner, which does the work for
all: what shards and tp parts hold travels there, and each gets its share of the result back, replicas too. An expert's
matrices are matrices of their own, of which most processes hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from weft.checkpoint.region import Region
from weft.parallel.mesh import Mesh
from weft.parallel.woven import Weight

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5
"""Of the Newton-Schulz iteration: singular values end up near 1, between about 0.7 and 1.2."""
AT_ONCE = 4
"""Matrices that one owner works on at once."""

Box = tuple[int, int, int, int]
"""First row, end of rows, first column, end of columns of a share of a matrix."""


@dataclass(frozen=True)
class Round:
    """Matrices of one shape, by their numbers, with the owner of each: they travel and are worked on together."""

    dims: tuple[int, int]
    matrices: list[int]
    owners: list[int]


@dataclass(frozen=True)
class Share:
    """What this process holds of a matrix: rows of a weight, or nothing (None)."""

    name: str
    sizes: tuple[int, int]
    box: Box
    held: tuple[int, slice] | None  # number of the weight, and its rows


class Muon:
    """The matrices of one pipeline stage, as this process holds them. Momentum lies where the weight does."""

    def __init__(self, weights: Sequence[Weight], mesh: Mesh, momentum: float, decay: float) -> None:
        self.weights, self.momentum, self.decay, self.device = weights, momentum, decay, mesh.device
        self.group = stage_group(mesh)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.moments = [torch.zeros_like(weight.data) for weight in weights]
        self.shares, self.boxes = self._matrices()
        self.rounds = rounds([share.sizes for share in self.shares], self.size)
        # of all who hold the same share, the owner itself or the next one after it sends it
        self.senders = [self._senders(number, owner) for number, owner in self._owners()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients that lie in the weights, with Nesterov's look ahead."""
        for weight, moment in zip(self.weights, self.moments, strict=True):
            moment.mul_(self.momentum).add_(weight.grad)
        for one in self.rounds:
            held = [self.shares[number].held for number in one.matrices]
            directions = self._orthogonalized(one, [self._ahead(place) for place in held])
            rate = lr * 0.2 * max(one.dims) ** 0.5  # as long, in the mean, as an update of AdamW
            for place, direction in zip(held, directions, strict=True):
                if place is not None:
                    number, rows = place
                    share = self.weights[number].data[rows]
                    share.mul_(1 - lr * self.decay).sub_(direction.to(share.device), alpha=rate)

    def _ahead(self, place: tuple[int, slice] | None) -> Tensor:
        """Nesterov's look ahead: where the momentum will be after the same gradient once more. On the device."""
        if place is None:
            return torch.empty(0, device=self.device)
        number, rows = place
        return self.weights[number].grad[rows].add(self.moments[number][rows], alpha=self.momentum).to(self.device)

    def _orthogonalized(self, one: Round, shares: list[Tensor]) -> list[Tensor]:
        """This process's shares of whole matrices → its shares of the orthogonal ones."""
        mine = [number for number, owner in zip(one.matrices, one.owners, strict=True) if owner == self.rank]
        arrived = self._exchange(
            [
                [share for number, owner, share in zip(one.matrices, one.owners, shares, strict=True)
                 if owner == to and self.rank in self.senders[number]]
                for to in range(self.size)
            ],
            [[self.boxes[source][n] for n in mine if source in self.senders[n]] for source in range(self.size)],
            shares[0],
        )  # fmt: skip
        whole = shares[0].new_empty(len(mine), *one.dims)
        for source, parts in enumerate(arrived):
            sent = [place for place, number in enumerate(mine) if source in self.senders[number]]
            for place, part in zip(sent, parts, strict=True):
                whole[place][_slices(self.boxes[source][mine[place]])] = part
        done = newton_schulz(whole) if mine else whole
        returned = self._exchange(
            [[done[place][_slices(self.boxes[to][n])] for place, n in enumerate(mine)] for to in range(self.size)],
            [
                [self.boxes[self.rank][n] for n, owner in zip(one.matrices, one.owners, strict=True) if owner == source]
                for source in range(self.size)
            ],
            shares[0],
        )
        left = [iter(parts) for parts in returned]
        return [next(left[owner]) for owner in one.owners]

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[list[Box]], like: Tensor) -> list[list[Tensor]]:
        """Give each process of the stage its list of matrices; what each has for this one, of the sizes in `incoming`."""
        sizes = [[(box[1] - box[0]) * (box[3] - box[2]) for box in boxes] for boxes in incoming]
        sent = torch.cat([like.new_empty(0), *(part.flatten() for parts in outgoing for part in parts)])
        received = like.new_empty(sum(map(sum, sizes)))
        counts = [sum(part.numel() for part in parts) for parts in outgoing]
        dist.all_to_all_single(received, sent, list(map(sum, sizes)), counts, group=self.group)
        found = []
        for of, boxes, numbers in zip(received.split(list(map(sum, sizes))), incoming, sizes, strict=True):
            parts = zip(of.split(numbers), boxes, strict=True) if numbers else ()
            found.append([part.view(box[1] - box[0], box[3] - box[2]) for part, box in parts])
        return found

    def _matrices(self) -> tuple[list[Share], list[list[Box]]]:
        """All matrices of the stage, in the same order everywhere; and of each process, what it holds of each."""
        own = {
            region.name: Share(region.name, _pair(region.sizes), _box(region), (number, rows))
            for number, weight in enumerate(self.weights)
            for region, rows in weight.parts
        }
        told = [(share.name, share.sizes, share.box) for share in own.values()]
        everyone: list[list[tuple[str, tuple[int, int], Box]]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, told, group=self.group)
        sizes = {name: dims for of in everyone for name, dims, _ in of}
        nothing = (0, 0, 0, 0)
        shares = [own.get(name, Share(name, sizes[name], nothing, None)) for name in sorted(sizes)]
        boxes = [{name: box for name, _, box in of} for of in everyone]
        return shares, [[of.get(share.name, nothing) for share in shares] for of in boxes]

    def _owners(self) -> list[tuple[int, int]]:
        return sorted(pair for one in self.rounds for pair in zip(one.matrices, one.owners, strict=True))

    def _senders(self, number: int, owner: int) -> set[int]:
        chosen: dict[Box, int] = {}
        for distance in range(self.size):
            holder = (owner + distance) % self.size
            chosen.setdefault(self.boxes[holder][number], holder)
        (rows, columns), name = self.shares[number].sizes, self.shares[number].name
        held = sum((box[1] - box[0]) * (box[3] - box[2]) for box in chosen)
        assert held == rows * columns, f"{name}: its shares do not make up the whole"
        return set(chosen.values())


def rounds(dims: list[tuple[int, int]], size: int) -> list[Round]:
    """Matrices of one shape together, the largest first; owners take turns all along, so that none has much more to do."""
    found, owner = [], 0
    for shape in sorted(set(dims), key=lambda pair: (-pair[0] * pair[1], pair)):
        numbers = [number for number, of in enumerate(dims) if of == shape]
        for first in range(0, len(numbers), AT_ONCE * size):
            matrices = numbers[first : first + AT_ONCE * size]
            found.append(Round(shape, matrices, [(owner + place) % size for place in range(len(matrices))]))
            owner += len(matrices)
    return found


def newton_schulz(x: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each of x [N, R, C], about: fp32 on a CPU, bf16 on a GPU."""
    a, b, c = COEFFICIENTS
    y = x.bfloat16() if x.is_cuda else x
    y = y.mT if y.shape[-2] > y.shape[-1] else y  # the products are of the shorter side
    y = y / (torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype)


def stage_group(mesh: Mesh) -> dist.ProcessGroup:
    """All processes of this one's pipeline stage. Every process makes every group, in the same order."""
    own = None
    for ranks in mesh.devices.mesh.reshape(mesh.size("pp"), -1).tolist():
        group = dist.new_group(ranks)
        own = group if dist.get_rank() in ranks else own
    assert own is not None
    return own


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = sizes
    return rows, columns


def _box(region: Region) -> Box:
    return region.start[0], region.stop[0], region.start[1], region.stop[1]


def _slices(box: Box) -> tuple[slice, slice]:
    return slice(box[0], box[1]), slice(box[2], box[3])
