"""An engine that comes back: when it fails, its requests are told so, and another one is built in its place."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from weft.serve.desk import DeadError, Deliver
from weft.serve.engine import Engine
from weft.serve.loop import EngineLoop
from weft.serve.requests.request import RefusedError, Request
from weft.serve.stats import Stats

LOOK_SECONDS = 0.1
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before an engine that failed is built again; each failure in a row doubles them."""

STEADY_SECONDS = 60.0
"""An engine that lived so long starts the pauses over."""


class EngineKeeper:
    """Every method may be called from any thread.

    Attributes:
        first: the engine that was built first: all others have its tokenizer, end tokens and sizes.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self.first = build()
        self._loop: EngineLoop | None = EngineLoop(self.first)
        self._loop.start()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="weft-keeper", daemon=True)
        self._watcher.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """As EngineLoop.submit.

        Raises:
            ValueError: as there.
            RefusedError: as there, or the model is being loaded again.
        """
        loop = self._loop
        try:
            if loop is not None:
                return loop.submit(request, deliver)
        except DeadError:
            pass
        raise RefusedError("the engine failed and is being started again", retry_after=5.0)

    def cancel(self, id: str) -> None:
        if (loop := self._loop) is not None:
            loop.cancel(id)

    def stats(self) -> Stats | None:
        """Of the engine that is there; None while there is none."""
        loop = self._loop
        return loop.stats() if loop is not None else None

    def close(self) -> None:
        """End every request, and the engine."""
        self._closing.set()
        self._watcher.join()
        if self._loop is not None:
            self._loop.close()

    def _watch(self) -> None:
        pause, began = FIRST_PAUSE, time.monotonic()
        while not self._closing.wait(LOOK_SECONDS):
            if self._loop is not None and self._loop.alive:
                continue
            if self._loop is not None:
                failed, self._loop = self._loop, None
                print(f"weft: the engine failed and is started again: {failed.error}", file=sys.stderr, flush=True)
                failed.close()
                pause = FIRST_PAUSE if time.monotonic() - began > STEADY_SECONDS else pause
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                loop = EngineLoop(self._build())
            except Exception as error:  # noqa: BLE001 (whatever it is, it is tried again)
                print(f"weft: the engine did not start: {error}", file=sys.stderr, flush=True)
                continue
            loop.start()
            self._loop, began = loop, time.monotonic()
