"""How context parallelism cuts a sequence: into 2n chunks, of which process i of n has number i and number 2n-1-i.

A causal token sees all that came before it: late chunks are more work than early ones. One of each is the same work
for everybody. T is the whole sequence, in chunks of C = T/2n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunks_of(seq: int, ways: int, index: int) -> tuple[range, range]:
    """The tokens of a process's two chunks, as they are numbered in the sequence."""
    size = seq // (2 * ways)
    return tuple(range(chunk * size, (chunk + 1) * size) for chunk in (index, 2 * ways - 1 - index))  # type: ignore[return-value]


def own_tokens(x: Tensor, ways: int, index: int) -> Tensor:
    """A process's two chunks of a sequence: [..., T] → [..., T/n]."""
    early, late = chunks_of(x.shape[-1], ways, index)
    return torch.cat((x[..., early.start : early.stop], x[..., late.start : late.stop]), dim=-1)


def in_sequence(parts: Tensor) -> Tensor:
    """What every process has, put in the order of the sequence: [n, ..., 2C, E] → [..., T, E]."""
    halves = parts.unflatten(-2, (2, parts.shape[-2] // 2))
    early, late = halves[..., 0, :, :], halves[..., 1, :, :].flip(0)
    return torch.cat((early.movedim(0, -3), late.movedim(0, -3)), dim=-3).flatten(-3, -2)


def by_process(x: Tensor, ways: int) -> Tensor:
    """The reverse: [..., T, E] → [n, ..., 2C, E]."""
    chunks = x.unflatten(-2, (2 * ways, x.shape[-2] // (2 * ways))).movedim(-3, 0)
    return torch.cat((chunks[:ways], chunks[ways:].flip(0)), dim=-2)
