"""The processes that the first one of an engine begins, and whether they live. Torch-free.

Each sends a beat every second down a pipe that it alone can write to. A death closes the pipe, whatever the process was
doing, and whatever the first one waits for: it is noticed at once. Silence is a process that was stopped or hangs as a
whole: it is ended, which is a death. And nobody reads the beats of those whose first process is gone: they end too.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

BEAT_SECONDS = 1.0

SILENT_SECONDS = 8.0
"""How late a beat may be, on a machine that is busy with others."""

ENDING_SECONDS = 0.2
"""Between a process's last message and its end."""


class RankDiedError(RuntimeError):
    """One of the processes that serve a model has ended."""


class Workers:
    """Processes 1, 2, … of an engine; the first, number 0, is this one.

    Args:
        codes: what each runs, in Python, where `beat` stands for the pipe's number, to be given to `start_beating`.
        env: of all of them.
        names: what errors call them.
        files: numbers of open files that they have too.

    Attributes:
        noticed: when the first death was noticed, on `time.monotonic`'s clock.
    """

    def __init__(
        self, codes: Sequence[str] = (), env: Mapping[str, str] | None = None, names: Sequence[str] = (),
        files: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.names = names or [f"process {index} of {1 + len(codes)}" for index in range(1, 1 + len(codes))]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._beats: list[int] = []
        self.noticed: float | None = None
        self._silent: set[int] = set()
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None
        for code in codes:
            ours, theirs = os.pipe()
            self._beats.append(ours)
            command = [sys.executable, "-c", f"beat = {theirs}; {code}"]
            try:
                process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs, *files])
            finally:
                os.close(theirs)
            self.processes.append(process)

    def watch(self, died: Callable[[RankDiedError], None]) -> None:
        """From now on, have `died` called, once and from a thread of its own, when one of them has ended or hangs."""
        self._thread = threading.Thread(target=self._watch, args=[died], name="weft-workers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            RankDiedError: a process has ended that should not have.
        """
        for index, process in enumerate(self.processes):
            if process.poll() is not None:
                raise self._error(index)

    def cause(self, error: BaseException) -> BaseException:
        """What a step failed of: where messages broke because a process ended, or is about to, that; else its own error."""
        end = time.monotonic() + ENDING_SECONDS
        while self.processes and time.monotonic() < end:
            try:
                self.check()
            except RankDiedError as died:
                died.__cause__ = error
                return died
            time.sleep(0.01)
        return error

    def wait(self) -> None:
        """Until all have ended, having been told to; one that does not is ended."""
        self._leaving.set()
        with suppress(subprocess.TimeoutExpired):
            for process in self.processes:
                process.wait(SILENT_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End them, whatever they are doing."""
        self._leaving.set()
        for process in self.processes:
            process.kill()
            process.wait()
        self._close()

    def _watch(self, died: Callable[[RankDiedError], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for index, beat in enumerate(self._beats):
                selector.register(beat, selectors.EVENT_READ, index)
            silence, last = [0.0] * len(self._beats), time.monotonic()
            while not self._leaving.is_set():
                heard = {key.data: key.fd for key, _ in selector.select(BEAT_SECONDS)}
                now = time.monotonic()
                passed, last = min(now - last, BEAT_SECONDS), now  # where all were paused, nobody could beat
                for index, process in enumerate(self.processes):
                    if index not in heard:
                        silence[index] += passed
                        if silence[index] > SILENT_SECONDS and index not in self._silent:
                            self._silent.add(index)
                            process.kill()
                    elif os.read(heard[index], 4096):
                        silence[index] = 0.0
                    elif not self._leaving.is_set():
                        self.noticed = time.monotonic()
                        died(self._error(index))
                        return

    def _error(self, index: int) -> RankDiedError:
        name = self.names[index]
        if index in self._silent:
            return RankDiedError(f"{name} gave no sign of life for {SILENT_SECONDS:g} s, and was ended")
        try:
            return RankDiedError(f"{name} ended with exit code {self.processes[index].wait(ENDING_SECONDS)}")
        except subprocess.TimeoutExpired:
            return RankDiedError(f"{name} is ending")

    def _close(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        while self._beats:
            os.close(self._beats.pop())


def start_beating(pipe: int) -> None:
    """In a process of `Workers`: tell the first one that this one lives; end when nobody listens.

    Ctrl-C in a terminal, or what stops a whole service, reaches every process of it: the first one says what follows.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)

    def beat() -> None:
        while True:
            try:
                os.write(pipe, b".")
            except OSError:
                os._exit(1)
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, name="weft-beat", daemon=True).start()
