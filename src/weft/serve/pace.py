"""How long a step may take before it hangs, going by the steps before it. Torch-free."""

from __future__ import annotations

SURE_SECONDS = 8.0
"""That every step may take, on a machine that is busy with others: as late as a beat may be, see `cut/workers.py`."""

TIMES = 20
"""What took so many times as long as the slowest of its kind so far does not end by itself."""


class Pace:
    """Steps of as many tokens, to the next power of two, are of one kind: a step of one token tells nothing of one that
    reads a prompt, which takes as long as its tokens one by one at most."""

    def __init__(self) -> None:
        self._slowest: dict[int, float] = {}  # seconds, by the bits of the number of tokens

    def took(self, tokens: int, seconds: float) -> None:
        """A step has ended."""
        kind = tokens.bit_length()
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))

    def patience(self, tokens: int, most: float) -> float:
        """Seconds after which a step of so many tokens hangs; `most`, where nothing is known yet."""
        if not self._slowest:
            return most
        kind, kinds = tokens.bit_length(), list(self._slowest)  # other threads ask while steps end
        like = max((known for known in kinds if known <= kind), default=min(kinds))
        return min(most, max(SURE_SECONDS, TIMES * self._slowest[like] * 2 ** max(0, kind - like)))
