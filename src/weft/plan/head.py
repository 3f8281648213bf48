"""What logits take, and what the head needs beside them in its backward pass, in closed form. Torch-free.

plan/logits.py has what weft's own loss works in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.plan.logits import HEAD_COLUMNS, HEAD_ROWS, VECTOR
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Head:
    """Bytes of the process with the head.

    Attributes:
        logits: of all micro-batches whose backward pass is still to come; where logits are never whole, in their place gradients of the head.
        beside: its gradient, if nothing else has it, and what FSDP2 keeps of the pass before: what gradients outside of
            the blocks were reduced from.
    """

    logits: Num
    beside: Num

    @classmethod
    def of(cls, work: Work, table: Num, tables: Num) -> Head:
        """
        Args:
            table: numbers of the head.
            tables: of all that is no block's.
        """
        s, c, soft = work.sizes, work.cut, work.software
        columns = s.vocab / np.where(soft.whole_head, 1, c.tp)
        fsdp2 = (soft.padded > 0) & (soft.weights > c.item)
        # of every micro-batch, where all go forward before the first goes back
        flying = np.where((c.pp > 1) & np.isinf(c.flying), work.micro_batches, 1.0)
        one = np.maximum(soft.logits, c.item) * work.tokens * columns
        one = np.where(c.chunked, np.where(fsdp2, c.item * table, one / 16), one)
        kept = (c.zero >= 2) * (work.micro_batches > 1) * soft.reduced * tables
        chunk = 4 * table + c.item * (HEAD_ROWS * columns + np.minimum(HEAD_COLUMNS, columns) * s.hidden)
        gradient = np.where(c.chunked, chunk, np.where(c.zero == 3, 0.0, c.item * table))  # ZeRO-3's is gathered for it
        odd = soft.padded * (np.ceil(columns) % VECTOR > 0) * c.item * table  # then products have a copy of it
        inputs = fsdp2 * c.item * work.tokens * s.hidden * (1 + 1 / np.where(c.sp, c.tp, 1))  # of the head, and its norm
        return cls(flying * one + (flying - 1) * inputs, fsdp2 * (kept + gradient + odd))
