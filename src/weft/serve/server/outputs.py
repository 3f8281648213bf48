"""Outputs on their way from an engine's thread to whoever asked, in an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Self

from weft.serve.desk import Desk
from weft.serve.requests.request import Output, Request
from weft.serve.server.errors import FAILED
from weft.serve.server.metrics import Meter
from weft.serve.server.timing import Timing


class Mailbox:
    """Outputs on their way from an engine's thread to one reader in an event loop."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._items: deque[Output] = deque()
        self._come = asyncio.Event()
        self._told = False

    def put(self, output: Output) -> None:
        """By the engine's thread."""
        self._items.append(output)
        if not self._told:  # one knock for all that lies there
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._come.set)
            except RuntimeError:  # the reader's event loop is gone
                self._cancel(output.id)

    async def take(self) -> list[Output]:
        """All that has come, at least one."""
        while not self._items:
            await self._come.wait()
            self._come.clear()
            self._told = False
        outputs = []
        while self._items:
            outputs.append(self._items.popleft())
        return outputs


def joined(outputs: Sequence[Output]) -> list[Output]:
    """What lies there of one completion, as one: in a rush there is less to tell, and more in it. That one was cut off
    comes last, and by itself."""
    found: dict[tuple[str, int], Output] = {}
    ends = []
    for output in outputs:
        key = output.id, output.index
        if output.finish not in (None, "stop", "length"):
            ends.append(output)
        else:
            found[key] = found[key].and_then(output) if key in found else output
    return [*found.values(), *ends]


class Outputs:
    """The outputs of requests that have begun.

    Args:
        ended: called with how many completions have ended now, until all of them have; not where none was begun.
    """

    def __init__(
        self, desk: Desk, requests: Sequence[Request], meter: Meter, ended: Callable[[int], None] = lambda count: None
    ) -> None:  # fmt: skip
        self._desk, self._meter = desk, meter
        self._mailbox = Mailbox(desk.cancel)
        self._ended: Callable[[int], None] = lambda count: None
        self._left: dict[str, int] = {}  # completions that have not ended
        self._timings = {request.id: Timing(request) for request in requests}
        try:
            if len(requests) > 1:  # none begins where one cannot
                desk.about.check_all(requests)
                desk.check_room(sum(request.n for request in requests))
            for request in requests:
                desk.submit(request, self._mailbox.put)
                self._left[request.id] = request.n
        except (ValueError, RuntimeError) as error:
            meter.refuse(type(error).__name__.removesuffix("Error").lower())
            self.close()
            raise
        self._ended = ended

    async def __aiter__(self) -> AsyncGenerator[Output, None]:
        while self._left:
            for output in await self._mailbox.take():
                yield self._count(output)

    async def joined(self) -> AsyncGenerator[Output, None]:
        """The same, where nobody counts them: what lies there of one completion is one."""
        while self._left:
            for output in joined([self._count(output) for output in await self._mailbox.take()]):
                yield output

    def _count(self, output: Output) -> Output:
        if output.finish is not None:
            self._ended(1)
            self._left[output.id] -= 1
            if not self._left[output.id]:
                del self._left[output.id]
        self._meter.token(output, self._timings[output.id])
        if output.finish == "error" and self._desk.error is not None:
            return replace(output, error=FAILED)
        return output

    def close(self) -> None:
        """Cancel what has not ended."""
        for id in self._left:
            self._desk.cancel(id)
            self._meter.cut(self._timings[id])
            self._ended(self._left[id])
        self._left.clear()

    async def aclose(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
