"""See the processes of a run to their end: pass signals on, notice failures, leave nobody behind. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weft.launch.failure import Failure, of_exit

POLL = 0.05  # seconds
PEERS = 5.0  # seconds that the others have, after a failure, to fail by themselves
TOGETHER = 0.5  # seconds in which two signals are one: terminals and wrappers such as uv often send both
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone
}

Received = list[tuple[float, signal.Signals]]
Processes = Sequence[subprocess.Popen[bytes]]


@dataclass(frozen=True)
class End:
    """How a run ended: well, where both are empty."""

    failures: tuple[Failure, ...] = ()
    stopped: str = ""  # where a signal ended it before it could save: the sentence that says so


@contextmanager
def received_signals() -> Iterator[Received]:
    """Times and numbers of the signals that arrive, in place of what they would do; what was ignored stays ignored."""
    received: Received = []
    before = {}

    def note(number: int, _: object) -> None:
        received.append((time.monotonic(), signal.Signals(number)))

    if threading.current_thread() is threading.main_thread():
        heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_all(processes: Processes, received: Received, logs: Path) -> End:
    """Wait until all have ended. The first signal is passed on, once; a second one ends them. Between the two they have all
    the time they need: a step and a save may take long.

    Raises:
        KeyboardInterrupt: Ctrl-C ended them before there was anything to save.
    """
    failures: dict[int, Failure] = {}
    sent: signal.Signals | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(POLL)
        for rank, process in enumerate(processes):
            if process.poll() and rank not in failures:
                failures[rank] = of_exit(process.returncode, rank, logs, noticed=time.time() - 2 * POLL)
        if received and sent is None:
            sent = FORWARDED[received[0][1]]
            for process in processes:
                if process.poll() is None:
                    process.send_signal(sent)
        if failures:
            deadline = min(deadline, time.monotonic() + PEERS)
        if any(when > received[0][0] + TOGETHER for when, _ in received):
            kill_all(processes)
            return End(stopped="ended by a second signal: what was not saved by then is lost")
        if time.monotonic() > deadline:
            running = [rank for rank, process in enumerate(processes) if process.poll() is None]
            kill_all(processes)
            failures |= {rank: _hung(processes[rank], rank, logs) for rank in running}
    for rank, process in enumerate(processes):  # those that ended since the last look
        if process.returncode and rank not in failures:
            failures[rank] = of_exit(process.returncode, rank, logs, noticed=time.time())
    if failures and sent and all(process.returncode in (0, -sent, 128 + sent) for process in processes):
        if sent == signal.SIGINT:
            raise KeyboardInterrupt
        return End(stopped=f"ended by {sent.name} before there was anything to save")
    return End(failures=tuple(failures.values()))


def kill_all(processes: Processes) -> None:
    """End what still runs, each with the processes that it started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _hung(process: subprocess.Popen[bytes], rank: int, logs: Path) -> Failure:
    failure = of_exit(process.returncode, rank, logs, noticed=time.time())
    return replace(failure, message=f"hung: it was still there {PEERS:.0f} s after another rank had failed")
