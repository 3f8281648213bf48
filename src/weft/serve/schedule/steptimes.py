"""How long steps take, by how many tokens they have, going by those before. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

RECENT = 9
"""Steps of a size that tell how long one takes: their lower quartile, for what else the machine does only adds to it."""


class StepTimes:
    """Of steps of as many tokens, to the next power of two."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[tuple[float, int]]] = {}  # seconds and tokens, by the bits of these

    def took(self, tokens: int, seconds: float) -> None:
        """A step has ended."""
        self._recent.setdefault(tokens.bit_length(), deque(maxlen=RECENT)).append((seconds, tokens))

    def most(self, tokens: int, longer: float) -> int:
        """Tokens that a step may have so that it takes `longer` times as long as one of `tokens`; one more at least.

        Between sizes that are known it is a straight line. A size that is not is tried, if the one below is quick enough.
        """
        known = sorted((n, seconds) for seconds, n in map(quartile, self._recent.values()))
        size, seconds = tokens, alone(known, tokens)
        allowed = longer * seconds
        for more, took in known:
            if more <= size:
                continue
            if took > allowed:
                untried = more.bit_length() > size.bit_length() + 1
                line = size + int((more - size) * (allowed - seconds) / (took - seconds))
                return max(tokens + 1, line, largest_like(2 * size) if untried else 0)
            size, seconds = more, took
        return largest_like(2 * size)


def quartile(recent: Iterable[tuple[float, int]]) -> tuple[float, int]:
    found = sorted(recent)
    return found[(len(found) - 1) // 4]


def alone(known: Sequence[tuple[int, float]], tokens: int) -> float:
    """Seconds of a step of so many tokens: at least as long as of fewer; if all that is known is of more, on the line
    through the first two, or, going by one, in proportion."""
    if not known or known[0][0] <= tokens:
        return max((seconds for n, seconds in known if n <= tokens), default=0.0)
    (first, seconds), *more = known
    slope = max(0.0, (more[0][1] - seconds) / (more[0][0] - first)) if more else seconds / first
    return max(seconds * tokens / first, seconds - slope * (first - tokens))


def largest_like(tokens: int) -> int:
    """The most tokens that count as the same size."""
    return (1 << tokens.bit_length()) - 1
