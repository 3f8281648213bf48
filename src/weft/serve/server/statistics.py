"""How the requests of a model went, in Triton's terms: counts and times, since the server began. Torch-free."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from weft.serve.desk import DeadError
from weft.serve.requests.request import RefusedError
from weft.serve.server.errors import HttpError

PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
"""What times are told of: whole requests by how they ended; and of those that succeeded, waiting for a place in the engine;
reading the request and its prompt's tokens; the model; writing responses."""

REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Why a request failed: there was no room; its client left; the engine failed or is not there; something else, as a request
that makes no sense."""


@dataclass
class Clock:
    """One request's times, on `time.monotonic`'s clock.

    Attributes:
        began: when the engine first took it up.
        read: when all was ready for the engine.
        written: seconds spent on responses.
    """

    came: float
    read: float | None = None
    began: float | None = None
    written: float = 0.0


@dataclass
class Statistics:
    """
    Attributes:
        count, seconds: by part.
        failures: by reason.
        last: when a request last succeeded or failed, in seconds since 1970; 0: none did.
    """

    count: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: Counter[str] = field(default_factory=Counter)
    last: float = 0.0

    @contextmanager
    def request(self) -> Iterator[Clock]:
        """Around one request: what goes through it as an exception has failed."""
        clock = Clock(time.monotonic())
        try:
            yield clock
        except BaseException as error:
            self.failures[_reason(error)] += 1
            self._add("fail", time.monotonic() - clock.came)
            raise
        else:
            self._succeeded(clock)
        finally:
            self.last = time.time()

    def _succeeded(self, clock: Clock) -> None:
        ended = time.monotonic()
        read = clock.read or clock.came
        began = clock.began or read
        self._add("success", ended - clock.came)
        self._add("compute_input", read - clock.came)
        self._add("queue", max(0.0, began - read))
        self._add("compute_infer", max(0.0, ended - began - clock.written))
        self._add("compute_output", clock.written)

    def _add(self, part: str, seconds: float) -> None:
        self.count[part] += 1
        self.seconds[part] += seconds


def _reason(error: BaseException) -> str:
    if isinstance(error, RefusedError):
        return "REJECTED"
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "CANCELED"
    if isinstance(error, DeadError) or (isinstance(error, HttpError) and error.status == 503):
        return "BACKEND"
    return "OTHER"
