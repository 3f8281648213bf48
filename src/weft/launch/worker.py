"""One started process: it dies with its launcher, and says why it failed.

    python -m weft.launch.worker PACKAGE.MODULE:FUNCTION [ARGUMENTS]

The function takes the list of arguments, and returns an exit code or nothing. Under torchrun this works too, and
errors go torchrun's way.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from weft.launch.failure import of_exception

LAUNCHER = "WEFT_LAUNCHER_PID"
LOGS = "WEFT_LOGS"
PR_SET_PDEATHSIG = 1

Entry = Callable[[list[str]], int | None]


def load_entry(name: str) -> Entry:
    """The function that `package.module:function` names."""
    module, _, function = name.partition(":")
    entry: Entry = getattr(importlib.import_module(module), function)
    return entry


def die_with(launcher: int) -> None:
    """End this process at once when the launcher is gone, however it went: two runs must never write one folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it went before the line above
        os._exit(1)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    name, arguments = sys.argv[1], sys.argv[2:]
    if LAUNCHER not in os.environ:
        _run_under_torchrun(name, arguments)
        return
    die_with(int(os.environ[LAUNCHER]))
    faulthandler.enable()
    rank = int(os.environ["RANK"])
    try:
        code = load_entry(name)(arguments) or 0
    except Exception as error:  # noqa: BLE001 (the launcher shows it)
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this frame
        failure = of_exception(error, rank)
        failure.save(Path(os.environ[LOGS]))
        if rank != 0:  # to its file; on rank 0 it would stand on the terminal twice
            traceback.print_exception(error)
        code = 2 if failure.user else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # no waiting for threads and connections: the other ranks learn of it now
    sys.exit(0)


def _run_under_torchrun(name: str, arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(lambda: load_entry(name)(arguments))() or 0)


if __name__ == "__main__":
    main()
