"""Why a process of the run ended, and which of them was the first cause. Torch-free."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PEER_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # by name: torch is not imported here
PEER_WORDS = re.compile(r"gloo|NCCL|TCPStore|connection (closed|reset|refused|aborted)|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """The end of one process that did not end well."""

    rank: int
    time: float  # seconds since 1970
    message: str  # one sentence
    detail: str = ""  # traceback, or the last lines that the process wrote
    user: bool = False  # a mistake in the settings or the data, which the sentence explains
    peer: bool = False  # it only noticed that another process was gone

    def save(self, folder: Path) -> None:
        beside = folder / f".rank{self.rank}.failure"
        beside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(beside, failure_file(folder, self.rank))


def failure_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.failure.json"


def log_file(folder: Path, rank: int) -> Path:
    """What this rank wrote to stdout and stderr; rank 0 writes to the terminal instead."""
    return folder / f"rank{rank}.log"


def of_exception(error: BaseException, rank: int) -> Failure:
    """The failure that an exception stands for; call it where the exception is caught."""
    return Failure(
        rank,
        time.time(),
        str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
        detail="".join(traceback.format_exception(error)),
        user=isinstance(error, ValueError),
        peer=is_peer_error(error),
    )


def is_peer_error(error: BaseException | None) -> bool:
    """Whether an exception says no more than that a connection to another process is broken."""
    if error is None or isinstance(error, ValueError):
        return False
    if any(kind.__name__ in PEER_ERRORS for kind in type(error).__mro__):
        return True
    by_words = isinstance(error, RuntimeError | OSError) and PEER_WORDS.search(str(error)) is not None
    return by_words or is_peer_error(error.__cause__)


def of_exit(code: int, rank: int, folder: Path, noticed: float) -> Failure:
    """The failure of a process that ended with `code`: what it left behind, or what the code tells."""
    try:
        return Failure(**json.loads(failure_file(folder, rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    if code >= 0:
        message = f"the process left with exit code {code} and no exception"
    else:
        message = f"the process was ended by {signal.Signals(-code).name}"
        message += " (if nobody sent it: was the memory full?)" if code == -signal.SIGKILL else ""
    return Failure(rank, noticed, message, detail=_last_lines(log_file(folder, rank)))


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: the earliest that is not about a lost connection."""
    return min(failures, key=lambda failure: (failure.peer, failure.time))


def describe(cause: Failure, failures: Sequence[Failure], world: int, folder: Path) -> str:
    """What the user is told: once, with the rank where it matters."""
    everywhere = len(failures) == world and all(failure.message == cause.message for failure in failures)
    where = "" if everywhere else f"rank {cause.rank} of {world}: "
    text = f"weft: error: {where}{cause.message}"
    if cause.user:
        return text
    if cause.peer:
        text += "\n(no process left an error of its own; this is the first that lost its connection)"
    detail = f"\n\n{cause.detail.rstrip()}\n" if cause.detail else ""
    return f"{text}{detail}\nEach rank's output is in {folder}"


def _last_lines(file: Path, count: int = 20) -> str:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-count:])
