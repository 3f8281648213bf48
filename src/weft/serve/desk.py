"""Where requests are handed in and their outputs come out, wherever the engine is: on a thread of this process
(`loop.py`), or in a process of its own (`apart.py`). Torch-free.

    async for output in desk.stream(request):     # ends with the request; leaving early cancels it
        ...
    await desk.drain(timeout=30)

Whatever ends, ends its streams: an engine that fails tells every request so, at once, and takes no more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any, Protocol

from weft.serve.about import About
from weft.serve.requests.forms import Kind
from weft.serve.requests.request import Output, RefusedError, Request
from weft.serve.stats import Stats

Deliver = Callable[[Output], None]

RECENT = 64
"""Requests whose ends tell how fast the queue moves."""


class DeadError(RuntimeError):
    """The engine has failed, or was closed; this desk will take no request again."""


class Grammars(Protocol):
    """Compiles forms, as `grammar.GrammarCompiler` does; what comes of it is for `Request.grammar`."""

    def compile(self, kind: Kind, source: str | dict[str, Any] = "", timeout: float = 10.0) -> Any: ...

    def kept(self, kind: Kind, text: str) -> Any | None: ...


class Desk(ABC):
    """Every method may be called from any thread.

    Attributes:
        about: the engine.
        error: what it failed of; None while it lives.
        last_step: when a step last ended, on `time.monotonic`'s clock.
    """

    def __init__(self, about: About) -> None:
        self.about = about
        self.error: BaseException | None = None
        self.last_step = time.monotonic()
        self._live: dict[str, tuple[Deliver, set[int]]] = {}  # and the indices that have not ended
        self._places = 0  # of completions that have not ended
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._changed = threading.Condition()
        self._telling = threading.Lock()  # one output after the other; whoever submits does not wait for it
        self._draining = self._closing = False

    # -- where the engine is ------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stats(self) -> Stats:
        """As of the last step; requests that no step has seen yet count as waiting in `num_live` alone."""

    @abstractmethod
    def patience(self, most: float) -> float:
        """Seconds from the last step's end after which the engine hangs, if there is work; `most` at most."""

    @property
    @abstractmethod
    def grammars(self) -> Grammars:
        """
        Raises:
            ValueError: the engine has no tokenizer.
        """

    @abstractmethod
    def embed(self, prompt: list[int], adapter: str | None = None) -> Future[list[float]]:
        """As `embed.embed`, between two steps.

        Raises:
            RefusedError, DeadError: as `submit`.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel everything, tell so, and stop."""

    @abstractmethod
    def _hand_in(self, message: Request | str) -> None:
        """A request, or the id of one to cancel, for the engine. Under the lock."""

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether requests are taken, but for a full queue."""
        return self.error is None and not self._draining and not self._closing

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Take in a request. `deliver` gets each output, on a thread that all share: it must be quick, and must not raise.

        Raises:
            ValueError: as About.check, or the id is in use.
            RefusedError: the queue is full, or the engine is draining.
            DeadError: it has failed, or was closed.
        """
        self.about.check(request)
        with self._changed:
            if request.id in self._live:
                raise ValueError(f"request id {request.id!r} is in use")
            self.check_room(request.n)
            self._live[request.id] = (deliver, set(range(request.n)))
            self._places += request.n
            self._hand_in(request)

    def check_room(self, n: int = 1) -> None:
        """
        Raises:
            RefusedError: so many more completions would be too many just now, or the engine is draining.
            DeadError: it has failed, or was closed.
        """
        self._check_open()
        config = self.about.config
        if self._places + n > config.max_waiting + config.max_sequences:
            waiting = max(0, self._places - config.max_sequences)
            raise RefusedError(f"{waiting} completions are waiting already", self._retry_after(waiting))

    def cancel(self, id: str) -> None:
        """End a request; its last outputs say "cancelled". One that has ended, or never was, is nothing."""
        with self._changed:
            if id in self._live:
                self._hand_in(id)

    async def stream(self, request: Request) -> AsyncGenerator[Output, None]:
        """The outputs of a request, of all its completions as they come. To stop reading is to cancel it.

        Raises:
            ValueError, RefusedError, DeadError: as `submit`, before the first output.
        """
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(output: Output) -> None:
            try:
                loop.call_soon_threadsafe(outputs.put_nowait, output)
            except RuntimeError:  # the reader's event loop is gone
                self.cancel(output.id)

        self.submit(request, deliver)
        left = request.n
        try:
            while left:
                output = await outputs.get()
                left -= output.finish is not None
                yield output
        finally:
            if left:
                self.cancel(request.id)

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, let those that are in end, then stop. What is unfinished after `timeout` seconds is
        cancelled; whether nothing was."""
        with self._changed:
            self._draining = True
        end = time.monotonic() + timeout
        while self._live and self.error is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
        whole = not self._live
        await asyncio.to_thread(self.close)
        return whole

    def fail(self, error: BaseException) -> None:
        """The engine is done for: tell every request so now, whatever it is doing or waiting for."""
        with self._changed:
            if self.error is not None or self._closing:
                return
            self.error = error
            self._changed.notify()
        self._end_all()

    def _check_open(self) -> None:
        if self.error is not None or self._closing:
            raise DeadError(f"the engine has ended: {self.error or 'it was closed'}")
        if self._draining:
            raise RefusedError("the server is shutting down", retry_after=5.0)

    def _tell(self, outputs: list[Output]) -> None:
        """A step has ended, and this came of it."""
        with self._telling:
            for output in outputs if self.error is None else ():
                deliver, left = self._live[output.id]
                if output.finish is not None:
                    left.remove(output.index)
                    with self._changed:
                        self._places -= 1
                        if not left:
                            del self._live[output.id]
                            self._ends.append(time.monotonic())
                deliver(output)
        self.last_step = time.monotonic()

    def _end_all(self) -> None:
        """Once it takes no more requests. Whichever thread comes first tells why."""
        error = f"the engine failed: {type(self.error).__name__}: {self.error}" if self.error is not None else None
        with self._telling:
            for id, (deliver, left) in list(self._live.items()):
                for index in left:
                    deliver(Output(id, index, finish="error" if error else "cancelled", error=error))
            with self._changed:
                self._live.clear()
                self._places = 0

    def _retry_after(self, waiting: int) -> float:
        """Seconds in which the queue should be half as long, going by how fast requests ended of late."""
        if len(self._ends) < 2:
            return 1.0
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(60.0, max(1.0, pace * waiting / 2))
