"""The engine's own thread, and the way there and back for any other: callbacks, or asyncio.

    loop = EngineLoop(Engine.load(path, config))
    loop.start()
    async for output in loop.stream(request):     # ends with the request; leaving early cancels it
        ...
    await loop.drain(timeout=30)

Steps run one after the other as long as there is work. Whatever ends, ends its streams: an engine that fails tells every
request so, at once, and takes no more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from weft.serve.engine import Engine
from weft.serve.pace import Pace
from weft.serve.request import Output, RefusedError, Request
from weft.serve.stats import Stats

Deliver = Callable[[Output], None]

RECENT = 64
"""Requests whose ends tell how fast the queue moves."""


class DeadError(RuntimeError):
    """The engine has failed, or was closed; this loop will take no request again."""


@dataclass(frozen=True)
class Job:
    """What the engine's thread is to do beside its steps."""

    work: Callable[[Engine], Any]
    future: Future[Any]

    def run(self, engine: Engine) -> None:
        """
        Raises:
            Exception: the engine itself failed. A ValueError is for whoever asked.
        """
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work(engine))
        except ValueError as error:
            self.future.set_exception(error)
        except BaseException:
            self.future.set_exception(DeadError("the engine has ended"))
            raise

    def refuse(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineLoop:
    """One thread around one engine. Every method may be called from any thread.

    Attributes:
        engine: not to be touched elsewhere; but `check`, `shape`, `eos`, `tokenizer` and `max_context` never change.
        error: what the engine failed of; None while it lives.
        last_step: when a step last ended, on `time.monotonic`'s clock.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.last_step = time.monotonic()
        self._pace = Pace()
        self._aside = False  # the thread is busy with what is no step
        self._live: dict[str, tuple[Deliver, set[int]]] = {}  # and the indices that have not ended
        self._inbox: deque[Request | str | Job] = deque()  # requests, ids to cancel, and what else is to be done
        self._queued = 0  # completions of the requests in the inbox
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._changed = threading.Condition()
        self._telling = threading.Lock()  # one output after the other; whoever submits does not wait for it
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._work, name="weft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self.engine.ranks is not None:
            self.engine.ranks.workers.watch(self.fail)

    @property
    def alive(self) -> bool:
        """Whether requests are taken, but for a full queue."""
        return self._thread.is_alive() and self.error is None and not self._draining and not self._closing

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def stats(self) -> Stats:
        """Now; requests that no step has seen yet count as waiting in `num_live` alone."""
        return self.engine.stats()

    def patience(self, most: float) -> float:
        """Seconds from the last step's end after which the engine hangs, if there is work; `most` at most."""
        compiles = self.engine.config.compile  # steps of a new kind, whatever those before took
        return most if self._aside or compiles else self._pace.patience(self.engine.scheduler.planned, most)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Take in a request. `deliver` gets each output, on the engine's thread: it must be quick, and must not raise.

        Raises:
            ValueError: as Engine.check, or the id is in use.
            RefusedError: the queue is full, or the engine is draining.
            DeadError: it has failed, or was closed.
        """
        self.engine.check(request)
        with self._changed:
            if request.id in self._live:
                raise ValueError(f"request id {request.id!r} is in use")
            self.check_room(request.n)
            self._live[request.id] = (deliver, set(range(request.n)))
            self._inbox.append(request)
            self._queued += request.n
            self._changed.notify()

    def check_room(self, n: int = 1) -> None:
        """
        Raises:
            RefusedError: so many more completions would be too many just now, or the engine is draining.
            DeadError: it has failed, or was closed.
        """
        self._check_open()
        waiting = self._queued + len(self.engine.scheduler.waiting)
        if waiting + n > self.engine.config.max_waiting + self.engine.free_places:
            raise RefusedError(f"{waiting} completions are waiting already", self._retry_after(waiting))

    def cancel(self, id: str) -> None:
        """End a request; its last outputs say "cancelled". One that has ended, or never was, is nothing."""
        with self._changed:
            if id in self._live:
                self._inbox.append(id)
                self._changed.notify()

    def call(self, work: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread do something else between two steps, while all others wait; what comes of it. Whatever
        it raises but a ValueError, the engine has failed.

        Raises:
            RefusedError, DeadError: as `submit`.
        """
        job = Job(work, Future())
        with self._changed:
            self._check_open()
            if len(self._inbox) > self.engine.config.max_waiting:
                raise RefusedError(f"{len(self._inbox)} requests are waiting already", retry_after=1.0)
            self._inbox.append(job)
            self._changed.notify()
        return job.future

    def _check_open(self) -> None:
        if self.error is not None or self._closing:
            raise DeadError(f"the engine has ended: {self.error or 'it was closed'}")
        if self._draining:
            raise RefusedError("the server is shutting down", retry_after=5.0)

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

    def close(self) -> None:
        """Cancel everything, tell so, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.error is not None and self.engine.ranks is not None:
            self.engine.ranks.kill()  # a step may wait for them
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.engine.close()

    def fail(self, error: BaseException) -> None:
        """The engine is done for: tell every request so now, whatever its thread is doing or waiting for."""
        with self._changed:
            if self.error is not None or self._closing:
                return
            self.error = error
            self._changed.notify()
        self._end_all()

    def _work(self) -> None:
        try:
            while self._take_in():
                began = time.monotonic()
                outputs = self.engine.step()
                if planned := self.engine.scheduler.planned:
                    self._pace.took(planned, time.monotonic() - began)
                with self._telling:
                    for output in outputs if self.error is None else ():
                        self._tell(output)
                self.last_step = time.monotonic()
        except BaseException as error:  # noqa: BLE001 (told to every request; nothing else ever would)
            self.fail(error if self.engine.ranks is None else self.engine.ranks.workers.cause(error))
        self._end_all()

    def _take_in(self) -> bool:
        """Wait for work, and bring what came to the engine; False: stop."""
        jobs: list[Job] = []
        with self._changed:
            while not (self._inbox or self.engine.busy or self._closing or self.error):
                self._changed.wait()
            if self._closing or self.error:
                return False
            while self._inbox:
                item = self._inbox.popleft()
                if isinstance(item, Request):
                    self._queued -= item.n
                    self.engine.take_in(item)
                elif isinstance(item, Job):
                    jobs.append(item)
                else:
                    self.engine.cancel(item)
        while jobs:  # not under the lock: others may come meanwhile
            self._aside = True
            try:
                jobs.pop(0).run(self.engine)
                self.last_step, self._aside = time.monotonic(), False
            except BaseException:
                for job in jobs:
                    job.refuse(DeadError("the engine has ended"))
                raise
        return True

    def _tell(self, output: Output) -> None:
        deliver, left = self._live[output.id]
        if output.finish is not None:
            left.remove(output.index)
            if not left:
                del self._live[output.id]
                self._ends.append(time.monotonic())
        deliver(output)

    def _end_all(self) -> None:
        """Once it takes no more requests. Whichever thread comes first tells why."""
        error = f"the engine failed: {type(self.error).__name__}: {self.error}" if self.error is not None else None
        with self._telling:
            for id, (deliver, left) in list(self._live.items()):
                for index in left:
                    deliver(Output(id, index, finish="error" if error else "cancelled", error=error))
            self._live.clear()
            for item in self._inbox:
                if isinstance(item, Job):
                    item.refuse(DeadError("the engine has ended"))
            self._inbox.clear()

    def _retry_after(self, waiting: int) -> float:
        """Seconds in which the queue should be half as long, going by how fast requests ended of late."""
        if len(self._ends) < 2:
            return 1.0
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(60.0, max(1.0, pace * waiting / 2))
