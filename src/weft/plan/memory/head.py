"""What logits take, and what the head needs beside them in its backward pass, in closed form. Torch-free.

plan/memory/logits.py has what weft's own loss works in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.plan.memory.held import Held
from weft.plan.memory.kept import Kept
from weft.plan.memory.logits import HEAD_COLUMNS, HEAD_ROWS, VECTOR
from weft.plan.work import Num, Work


@dataclass(frozen=True)
class Head:
    """Bytes of the process with the head.

    Attributes:
        logits: of one micro-batch; where they are never whole, in their place gradients of the head.
        waiting: of all others whose backward pass is still to come.
        beside: what else is there with the logits: what goes into the norm and the head, and its gradient; the head's own.
        gradient: of it from then on: FSDP2 reduces it when all others are.
    """

    logits: Num
    waiting: Num
    beside: Num
    gradient: Num

    @classmethod
    def of(cls, work: Work, held: Held, kept: Kept) -> Head:
        s, c, soft = work.sizes, work.cut, work.software
        columns = s.vocab / np.where(soft.whole_head, 1, c.tp)
        table, whole = c.item * held.table, c.item * work.tokens * s.hidden
        # of every micro-batch, where all go forward before the first goes back
        flying = np.where((c.pp > 1) & np.isinf(c.flying), work.micro_batches, 1.0)
        one = np.maximum(soft.logits, c.item) * work.tokens * columns
        one = np.where(c.chunked, np.where(soft.own_head, table, one / 16), one)
        inputs = soft.own_head * whole  # its norm has what other stages send on
        chunk = 4 * held.table + c.item * (HEAD_ROWS * columns + np.minimum(HEAD_COLUMNS, columns) * s.hidden)
        odd = (np.ceil(columns) % VECTOR > 0) * table  # then products have a copy of it
        # what is gathered counts two blocks, of which one is there, or none before the backward pass
        blocks = (c.zero == 3) * c.item * (held.block + c.chunked * held.common)
        beside = 2 * whole + (c.pp == 1) * kept.input + odd + np.where(c.chunked, chunk, table) - blocks
        sharded = (c.zero > 0) | (c.away > 0)
        gradient = np.where(sharded | (s.tied > 0) & (c.pp == 1), table, 0.0)
        return cls(one, (flying - 1) * (one + inputs), soft.own_head * beside, soft.own_head * gradient)
