"""Forms of texts, compiled for clients beside the event loop: what one of them asks for holds the others up little."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from weft.serve.desk import Grammars
from weft.serve.requests.forms import HELPERS, Kind, text_of
from weft.serve.requests.request import RefusedError
from weft.serve.server.errors import HttpError
from weft.serve.server.metrics import Meter
from weft.serve.server.shares import Shares

if TYPE_CHECKING:
    from weft.serve.requests.request import Compiled

TURNS = HELPERS + 1
"""Forms of one key that are compiled at once, the others wait: as many as there are helpers, and the one for which a slow
form gives way."""

WAITERS = ThreadPoolExecutor(4 * HELPERS, thread_name_prefix="weft-forms")
"""Threads that wait for a form to be compiled: not those that tokenize, so a slow form holds up other forms alone."""


class Forms:
    """Of one model's requests. To be used in one event loop.

    Args:
        shares: of the model's room: a request that waits for its form holds a place.
        room: requests that may wait.
        meter: counts who may not.
    """

    def __init__(self, shares: Shares, room: int, meter: Meter) -> None:
        self.shares, self.room, self.meter = shares, room, meter
        self._held = 0
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(TURNS))

    async def compile(
        self, compiler: Grammars, kind: Kind, source: str | dict[str, Any], tenant: str, seconds: float
    ) -> Compiled:
        """
        Args:
            tenant: which key asks.
            seconds: that the request has left.

        Raises:
            ValueError: it cannot be compiled, or not in time.
            RefusedError: too many wait already, or too many of this key.
            HttpError: the request's time was up.
        """
        text = text_of(source)
        if (kept := compiler.kept(kind, text)) is not None:
            return kept
        try:
            async with asyncio.timeout(seconds):
                with self._place(tenant):
                    return await self._compile(compiler, kind, text, self._turns[tenant])
        except TimeoutError:
            words = f"the deadline passed before the {kind} was compiled"
            raise HttpError(408, words, "deadline", {"x-should-retry": "false"}) from None

    @contextmanager
    def _place(self, tenant: str) -> Iterator[None]:
        """
        Raises:
            RefusedError: there is none.
        """
        with self.meter.refusals():
            if self._held >= self.room:
                raise RefusedError(f"{self._held} requests wait for their form to be compiled already", 5.0)
            self.shares.take(tenant, 1)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self.shares.give_back(tenant, 1)

    async def _compile(self, compiler: Grammars, kind: Kind, text: str, turns: asyncio.Semaphore) -> Any:
        """The turn is over when the work is: whoever leaves earlier has not made room for another form."""
        await turns.acquire()
        loop, future = asyncio.get_running_loop(), WAITERS.submit(compiler.compile, kind, text)

        def over(_: object) -> None:
            with suppress(RuntimeError):  # the event loop is gone
                loop.call_soon_threadsafe(turns.release)

        future.add_done_callback(over)
        return await asyncio.wrap_future(future)
