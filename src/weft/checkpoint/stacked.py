"""Which named tensors lie in the rows of a stacked one: a model holds its experts' matrices so."""

from __future__ import annotations

from weft.checkpoint.region import Region
from weft.models.parameters import expert_name
from weft.models.shape import Shape

Part = tuple[Region, slice]
"""A region of a named tensor, and the rows of this process's own that it lies in."""


def stacked_parts(
    shape: Shape, stacked: str, experts: range | None = None, ffn: range | None = None, rows: range | None = None
) -> list[Part]:
    """The parts of a tensor that stacks a matrix of some experts.

    Args:
        stacked: its name in the model.
        experts: those in it, in order; None: all.
        ffn: which rows of each expert's matrix; None: all.
        rows: of that stack, those that this process holds; None: all.
    """
    assert shape.experts is not None
    sizes = (shape.experts.ffn, shape.hidden)
    experts, ffn = experts or range(shape.experts.num_experts), ffn or range(shape.experts.ffn)
    rows = range(len(experts) * len(ffn)) if rows is None else rows
    found = []
    for index in range(rows.start // len(ffn), -(-rows.stop // len(ffn)) if rows else 0):
        first = index * len(ffn)  # of this expert, in the stack
        start, stop = max(rows.start, first), min(rows.stop, first + len(ffn))
        region = Region.whole(expert_name(stacked, experts[index]), sizes)
        region = region.narrow(0, ffn.start + start - first, ffn.start + stop - first)
        found.append((region, slice(start - rows.start, stop - rows.start)))
    return found
