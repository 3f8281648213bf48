"""Being asked to leave: save at the next step boundary, together with all other ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, preemption, Slurm's warning before a time limit, and a terminal that is gone."""
TOGETHER = 0.5  # seconds in which two signals are one: terminals and wrappers often send both


class StopRequest:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a request that the training loop sees between steps.

    A second signal acts as if this were not here. On leaving the `with` block the handlers are what they were.

        with StopRequest() as stop:
            for step in ...:
                ...
                if any process says stop.requested:
                    save(); break
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the one that asked this process
        self.since = 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            asked = [number for number in ASK if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in asked}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether this process was asked; others may not have been, so never act on this alone."""
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.since > TOGETHER:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
