"""Memory over time, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from weft.exact.ledger import Ledger
from weft.plan.memory.moments import TENSORS


@dataclass(frozen=True)
class Curve:
    """Columns of a picture: each shows the moment of its stretch when most was there.

    Attributes:
        bytes: of each kind, [kinds, columns]; kinds as TENSORS.
        phases: name, first column and end of each stretch of passes.
    """

    bytes: np.ndarray
    phases: list[tuple[str, float, float]]

    @classmethod
    def of(cls, ledger: Ledger, columns: int = 480) -> Curve:
        """The step, from its first forward pass on. Time is counted in births and deaths of tensors."""
        start = ledger.phases[min(1, len(ledger.phases) - 1)].start
        changes = np.zeros((len(TENSORS), ledger.now + 2), dtype=np.int64)
        for holding in ledger.holdings:
            row = changes[TENSORS.index(ledger.kind(holding))]
            row[holding.born] += holding.size
            if holding.died is not None:
                row[holding.died] -= holding.size
        held = changes.cumsum(axis=1)[:, start : ledger.now + 1]
        edges = np.linspace(0, held.shape[1], min(columns, held.shape[1]) + 1).astype(int)
        total = held.sum(axis=0)
        fullest = [first + int(total[first:end].argmax()) for first, end in pairwise(edges)]
        scale = (len(edges) - 1) / held.shape[1]
        starts = [*((phase.name, phase.start - start) for phase in ledger.phases[1:]), ("", held.shape[1])]
        spans = [(name, scale * first, scale * end) for (name, first), (_, end) in pairwise(starts)]
        return cls(held[:, fullest], spans)
