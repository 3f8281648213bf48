"""What logits take, and what the head needs beside them in its backward pass, in closed form. Torch-free.

plan/memory/logits.py has what weft's own loss works in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.plan.memory.held import Held
from weft.plan.memory.logits import HEAD_COLUMNS, HEAD_ROWS, VECTOR
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Head:
    """Bytes of the process with the head.

    Attributes:
        logits: of all micro-batches whose backward pass is still to come; where they are never whole, in their place
            gradients of the head.
        beside: its gradient, if nothing else has it, and what FSDP2 keeps of the pass before: what gradients outside of
            the blocks were reduced from.
    """

    logits: Num
    beside: Num

    @classmethod
    def of(cls, work: Work, held: Held) -> Head:
        s, c, soft = work.sizes, work.cut, work.software
        columns = s.vocab / np.where(soft.whole_head, 1, c.tp)
        known, table = (soft.own_head > 0) & (soft.weights > c.item), c.item * held.table
        # of every micro-batch, where all go forward before the first goes back
        flying = np.where((c.pp > 1) & np.isinf(c.flying), work.micro_batches, 1.0)
        one = np.maximum(soft.logits, c.item) * work.tokens * columns
        one = np.where(c.chunked, np.where(known, table, one / 16), one)
        inputs = known * c.item * work.tokens * s.hidden  # of the head; its norm has what other stages send on
        kept = (c.zero >= 2) * (work.micro_batches > 1) * soft.reduced * held.tables
        chunk = 4 * held.table + c.item * (HEAD_ROWS * columns + np.minimum(HEAD_COLUMNS, columns) * s.hidden)
        odd = (np.ceil(columns) % VECTOR > 0) * table  # then products have a copy of it
        # what ZeRO-3 gathers is told with the head's gradient, and with two blocks that are not there yet
        gathered = (c.zero == 3) * (table + (1 + c.chunked) * c.item * held.block)
        beside = kept + odd + np.where(c.chunked, chunk, table) - gathered
        return cls(flying * one + (flying - 1) * inputs, known * np.maximum(0.0, beside))
