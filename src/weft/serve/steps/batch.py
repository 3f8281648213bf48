"""Batch: one step's tokens of all sequences, end to end in one row, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from weft.serve.schedule.scheduler import Work


@dataclass(frozen=True)
class Batch:
    """N tokens of R sequences. All are integers on the CPU; lists are what Python reads, tensors what the device gets.

    Attributes:
        tokens, positions: [N], sequence by sequence.
        slots: where each token's keys and values go: block · block size + place in it, [N].
        counts: tokens of each sequence, R of them; they add up to N.
        ends: tokens of each sequence up to the last one here, R.
        tables: blocks of each sequence, R lists; for one that was given back, the cache's block of zeros stands.
        adapters: number of each sequence's adapter, R; 0: none.
        rows: places among the N of the tokens whose logits are wanted, [W].
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    counts: list[int]
    ends: list[int]
    tables: list[list[int]]
    adapters: list[int]
    rows: Tensor

    @classmethod
    def of(cls, works: Sequence[Work], block_size: int, all_rows: Sequence[bool]) -> Batch:
        """all_rows: whether logits of every token are wanted; else of those that a new token follows."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        tables: list[list[int]] = []
        for work, whole in zip(works, all_rows, strict=True):
            blocks, first = work.sequence.blocks, len(tokens)
            tokens += work.tokens
            positions += range(work.start, work.stop)
            slots += (blocks[at // block_size] * block_size + at % block_size for at in range(work.start, work.stop))
            tables.append(blocks[: -(-work.stop // block_size)])
            wanted = work.start if whole else len(work.sequence.tokens) - 1
            rows += range(first + wanted - work.start, first + work.stop - work.start)
        counts = [work.stop - work.start for work in works]
        return cls(
            torch.tensor(tokens), torch.tensor(positions), torch.tensor(slots), counts,
            [work.stop for work in works], tables, [work.sequence.adapter for work in works],
            torch.tensor(rows, dtype=torch.long),
        )  # fmt: skip

    def pack(self) -> Tensor:
        """All of it as one row of integers, for the other processes of a tp axis."""
        sizes = [len(self.tokens), len(self.counts), len(self.rows)]
        lists = [*sizes, *self.counts, *self.ends, *self.adapters, *map(len, self.tables)]
        blocks = [block for table in self.tables for block in table]
        return torch.cat((torch.tensor(lists + blocks), self.tokens, self.positions, self.slots, self.rows))

    @classmethod
    def unpack(cls, packed: Tensor) -> Batch:
        num_tokens, num_sequences, num_rows = packed[:3].tolist()
        counts, ends, adapters, lengths = packed[3 : 3 + 4 * num_sequences].view(4, -1).tolist()
        rest = packed[3 + 4 * num_sequences :]
        blocks, tokens, positions, slots, rows = rest.split([sum(lengths), *3 * [num_tokens], num_rows])
        tables = [table.tolist() for table in blocks.split(lengths)]
        return cls(tokens, positions, slots, counts, ends, tables, adapters, rows)

    def without_logits(self) -> Batch:
        """The same, of which nothing but keys and values is wanted."""
        return replace(self, rows=self.rows[:0])

    @property
    def starts(self) -> list[int]:
        """Place of each sequence's first token, R."""
        return [0, *accumulate(self.counts)][:-1]
