"""Bytes that the head and the loss work in, beside the logits that they keep. Torch-free."""

from __future__ import annotations

from weft.plan.memory.activations import FLOAT, ITEM, Pass

LOSS_ROWS, LOSS_CPU_LOGITS = 1024, 2**19
"""Positions, or on a CPU logits, whose loss is worked out at once: parallel/loss.py."""
HEAD_ROWS, HEAD_COLUMNS = 1024, 8192
"""Where logits are never whole: positions that have them at once; tokens whose gradient of the head exists at once."""
VECTOR = 8
"""A vocabulary that is no multiple of it is odd to a GPU: models/head.py."""


def loss_workspace(one: Pass, device: str, table: int) -> int:
    """The fp32 copy that the loss is worked out in, some rows at a time; on a GPU three numbers a row, for Triton's
    kernels need no copy. Where the logits are never whole, also those of some rows, the head's input beside its
    gradient, and the fp32 sum of the head's own.

    Args:
        table: numbers of the head that this process has.
    """
    layout, item = one.layout, ITEM[one.layout.compute]
    columns = one.logits // (item * one.tokens)
    whole, rounded = layout.loss == "whole", rounded_head(one, device, table)
    at_once = one.tokens if whole else min(HEAD_ROWS, one.tokens)
    rows = max(1, LOSS_CPU_LOGITS // columns) if layout.tp == 1 else LOSS_ROWS
    own = FLOAT * (3 * at_once if device == "cuda" else min(rows, one.tokens) * columns)
    if whole:
        return max(own, rounded)
    total = FLOAT * table + item * min(HEAD_COLUMNS, columns) * one.shape.hidden if item < FLOAT else 0
    return own + rounded + item * at_once * columns + one.whole + total


def rounded_head(one: Pass, device: str, table: int) -> int:
    """On a GPU, the copy of a head of an odd vocabulary that products are made with."""
    odd = device == "cuda" and table // one.shape.hidden % VECTOR > 0
    return odd * one.logits // one.tokens * one.shape.hidden
