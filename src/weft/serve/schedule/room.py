"""Room: how many blocks of the cache a sequence needs. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """
    Attributes:
        block: tokens of a block.
        step: tokens of one sequence that a step computes at most.
        window: tokens that every layer of every model sees, itself included; None: all before it.
    """

    block: int
    step: int
    window: int | None

    def blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens lie in."""
        return -(-num_tokens // self.block)

    def behind(self, computed: int) -> int:
        """Of a sequence's first blocks, those that no token after the `computed` ones sees.

        The last full one is held, seen or not: the next one that fills is found again by way of it (blocks.py).
        """
        if self.window is None:
            return 0
        return max(0, min((computed + 1 - self.window) // self.block, computed // self.block - 1))

    def most(self, num_tokens: int, computed: int = 0) -> int:
        """Blocks that a sequence holds at once at most, from its `computed` tokens on until it has so many."""
        whole = self.blocks(num_tokens) - self.behind(computed)
        if self.window is None:
            return whole
        # what a step adds, and what the first token of it sees, neither of which begins nor ends with a block
        tokens = min(num_tokens - computed, self.step) + max(self.window, self.block + 1)
        return min(whole, (tokens + 2 * self.block - 3) // self.block)
