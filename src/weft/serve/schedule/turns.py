"""Whose turn it is: tenants that ask for much let others in between. Torch-free."""

from __future__ import annotations

from collections import Counter


class Turns:
    """Completions of all tenants in one order: each tenant's one after the other, with one of every other tenant that waits
    between two of them (start-time fair queueing, Goyal et al., 1996, where every completion counts as much).

    A turn is given once. Whoever comes after a pause begins where the others are, so nobody saves turns up, and nobody's
    new request stands before one that runs.
    """

    def __init__(self) -> None:
        self._reached = 0
        self._next = Counter[str]()

    def take(self, tenant: str) -> int:
        """The turn of a tenant's new completion; the smallest goes first, among equals whoever came first."""
        turn = max(self._reached, self._next[tenant])
        self._next[tenant] = turn + 1
        return turn

    def reach(self, turn: int) -> None:
        """It has begun."""
        self._reached = max(self._reached, turn)
