"""Blocks of the key-value cache: who holds which, and what is in them. Torch-free.

A block has room for so many tokens. Full ones can be found again by what they hold and what came before (Kwon et al.,
PagedAttention, 2023): they form a tree, keyed by the block before and the tokens themselves, so that two texts are never
taken for one another because their hashes are equal: Python compares the tokens where hashes meet.
"""

from __future__ import annotations

from collections.abc import Sequence

Key = tuple[int | str, tuple[int, ...]]
"""The block before, by its serial number, or for a first block the salt; and the tokens."""


class Blocks:
    """All blocks, those that nobody holds in the order of their release: the longest unused is given away first.

    Attributes:
        size: tokens of a block.
        count: blocks in all.
        hits, lookups: tokens found, and tokens looked for, by `match`.
    """

    def __init__(self, count: int, size: int, keep: bool = True) -> None:
        """keep: whether full blocks can be found again."""
        self.count, self.size, self.keep = count, size, keep
        self.holders = [0] * count
        self.hits = self.lookups = 0
        self._free = dict.fromkeys(range(count))  # a dict keeps the order
        self._keys: list[Key | None] = [None] * count
        self._serials = [0] * count  # of what is in a block now; none is used twice
        self._next_serial = 1
        self._found: dict[Key, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Blocks that hold the beginning of `tokens`, now held once more by the caller; never the last token, for whose
        logits it must be computed."""
        self.lookups += len(tokens)
        blocks: list[int] = []
        before: int | str = salt
        for start in range(0, len(tokens) - self.size, self.size) if self.keep else ():
            block = self._found.get((before, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            before = self._serials[block]
            blocks.append(block)
        for block in blocks:
            self._hold(block)
        self.hits += len(blocks) * self.size
        return blocks

    def take(self, count: int, after: int | None = None) -> list[int]:
        """So many blocks for new tokens. What they held is forgotten.

        Args:
            after: the last block of the sequence: the next one in memory is preferred where it is free and holds nothing,
                for blocks in a row need not be gathered.
        """
        assert count <= self.num_free, (count, self.num_free)
        taken: list[int] = []
        for _ in range(count):
            near = -1 if after is None else after + 1
            block = near if near in self._free and self._keys[near] is None else next(iter(self._free))
            after = block
            self._forget(block)
            self._serials[block], self._next_serial = self._next_serial, self._next_serial + 1
            self._hold(block)
            taken.append(block)
        return taken

    def fill(self, block: int, before: int | None, tokens: Sequence[int], salt: str) -> None:
        """The block is full: it can be found from now on, unless another one of the same content can already.

        Args:
            before: the block before it in the sequence; None: it is the first.
        """
        if not self.keep:
            return
        assert len(tokens) == self.size, tokens
        if before is not None and self._keys[before] is None:
            return  # its own twin is found in its place: nothing leads here
        key: Key = (salt if before is None else self._serials[before], tuple(tokens))
        if key not in self._found:
            self._found[key], self._keys[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks; the last first, so that a text is forgotten from its end."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            assert self.holders[block] >= 0, block
            if not self.holders[block]:
                self._free[block] = None

    def forget_all(self) -> None:
        """Nothing can be found again: as after new weights. Only while nobody holds any."""
        assert self.num_free == self.count, "sequences hold blocks"
        for block in range(self.count):
            self._forget(block)

    def _hold(self, block: int) -> None:
        if not self.holders[block]:
            del self._free[block]
        self.holders[block] += 1

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._found[key]
            self._keys[block] = None
