"""The engine's own thread, and the way there and back for any other.

    loop = EngineLoop(Engine.load(path, config))
    loop.start()
    async for output in loop.stream(request):     # see desk.py
        ...

Steps run one after the other as long as there is work.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from weft.serve.desk import DeadError, Desk
from weft.serve.embed import embed
from weft.serve.engine import Engine
from weft.serve.pace import Pace
from weft.serve.requests.grammar import GrammarCompiler
from weft.serve.requests.request import RefusedError, Request
from weft.serve.stats import Stats


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


class EngineLoop(Desk):
    """One thread around one engine.

    Args:
        told: called on this thread behind every step, and at the end, when all outputs have been delivered.

    Attributes:
        engine: not to be touched elsewhere.
    """

    def __init__(self, engine: Engine, told: Callable[[], None] = lambda: None) -> None:
        super().__init__(engine.about)
        self.engine = engine
        self._told = told
        self._pace = Pace()
        self._aside = False  # the thread is busy with what is no step
        self._inbox: deque[Request | str | Job] = deque()  # requests, ids to cancel, and what else is to be done
        self._thread = threading.Thread(target=self._work, name="weft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self.engine.ranks is not None:
            self.engine.ranks.workers.watch(self.fail)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and super().alive

    @property
    def grammars(self) -> GrammarCompiler:
        return self.engine.grammars

    def stats(self) -> Stats:
        return self.engine.stats()

    def patience(self, most: float) -> float:
        compiles = self.engine.config.compile  # steps of a new kind, whatever those before took
        return most if self._aside or compiles else self._pace.patience(self.engine.scheduler.planned, most)

    def embed(self, prompt: list[int], adapter: str | None = None) -> Future[list[float]]:
        return self.call(partial(embed, prompt=prompt, adapter=adapter))

    def call(self, work: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread do something else between two steps, while all others wait; what comes of it. Whatever
        it raises but a ValueError, the engine has failed.

        Raises:
            RefusedError, DeadError: as `submit`.
        """
        job = Job(work, Future())
        with self._changed:
            self._check_open()
            if len(self._inbox) > self.about.config.max_waiting:
                raise RefusedError(f"{len(self._inbox)} requests are waiting already", retry_after=1.0)
            self._inbox.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.error is not None and self.engine.ranks is not None:
            self.engine.ranks.kill()  # a step may wait for them
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.engine.close()

    def _hand_in(self, message: Request | str) -> None:
        self._inbox.append(message)
        self._changed.notify()

    def _work(self) -> None:
        try:
            while self._take_in():
                began = time.monotonic()
                outputs = self.engine.step()
                if planned := self.engine.scheduler.planned:
                    self._pace.took(planned, time.monotonic() - began)
                self._tell(outputs)
                self._told()
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

    def _end_all(self) -> None:
        super()._end_all()
        with self._telling:
            for item in self._inbox:
                if isinstance(item, Job):
                    item.refuse(DeadError("the engine has ended"))
            self._inbox.clear()
        self._told()
