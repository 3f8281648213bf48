"""One request's times."""

from __future__ import annotations

import time
from collections import Counter

from weft.serve.requests.request import Request


class Timing:
    """When what happened to one request; on `time.monotonic`'s clock."""

    def __init__(self, request: Request) -> None:
        self.request, self.arrived = request, time.monotonic()
        self.first: float | None = None
        self.started, self.cached = self.arrived, 0
        self.last: dict[int, float] = {}  # by which of n
        self.tokens: Counter[int] = Counter()
        self.ended: set[int] = set()
