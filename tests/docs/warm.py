"""A `weft` that needs no start: each command is forked from an interpreter that has imported all of it already.

Of a command that trains, as of one that writes a text, most of the time is the import of torch; on the guide's pages there
are a hundred. The shell calls `weft`, which hands its arguments, folder, environment and files to a server, and ends as the
command ends. Processes of a run are forked too, by the command itself. A README's first steps are run as a user runs them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO

IMPORTED = (
    "torch._dynamo", "weft.cli.app", "weft.exact.rank", "weft.exact.report", "weft.plan.show.findings",
    "weft.plan.show.page", "weft.prompt.local", "weft.serve.engine", "weft.serve.server.run", "weft.train.trainer",
    "weft.verify.trace", "weft.verify.serve", "weft.tune.calibrate", "weft.export.huggingface", "weft.profile.page",
)  # fmt: skip

CLIENT = """\
#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
told = server.makefile()
pid = int(told.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(told.readline() or 1))
"""


@contextmanager
def warm_weft(folder: Path) -> Iterator[Path]:
    """A folder with such a `weft`, for the PATH."""
    path, client = folder / "socket", folder / "bin" / "weft"
    server = subprocess.Popen([sys.executable, __file__, str(path)])
    try:
        while not path.exists():
            assert server.poll() is None, "the server ended"
            time.sleep(0.05)
        client.parent.mkdir()
        client.write_text(CLIENT.format(python=sys.executable, path=str(path)))
        client.chmod(0o755)
        yield client.parent
    finally:
        server.kill()
        server.wait()


# -- the server -------------------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    import importlib

    import torch

    from forking import count_gpus

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a child of a parent with threads would hang
    count_gpus()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.made")
    listener.listen()
    os.rename(f"{path}.made", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            command(client)
        client.close()


def command(client: socket.socket) -> None:
    """What the shell wanted, in this process."""
    from weft.cli.app import main
    from weft.launch import local

    _, files, *_ = socket.recv_fds(client, 1, 3)
    arguments, folder, environment = json.load(client.makefile())
    client.sendall(f"{os.getpid()}\n".encode())
    os.setsid()
    os.chdir(folder)
    local.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]
    os._exit(run(main, ["weft", *arguments], environment, files, lambda code: client.sendall(f"{code}\n".encode())))


def run(
    main: Callable[[], None], arguments: Sequence[str], environment: dict[str, str], files: Sequence[int],
    told: Callable[[int], None] = lambda code: None,
) -> int:  # fmt: skip
    """As a new interpreter would; its exit code."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (closed by the end)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (as an interpreter does)
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    told(code)
    return code


class Forked:
    """In the place of a Popen, for processes of a run: forked from the launcher."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], stdin: int, stdout: IO[bytes] | None, stderr: IO[bytes] | None,
        pass_fds: Sequence[int], start_new_session: bool,
    ) -> None:  # fmt: skip
        from weft.launch import worker

        assert (command[0], command[1:3], stdin) == (sys.executable, ["-m", "weft.launch.worker"], subprocess.DEVNULL)
        assert stdout is stderr
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            atexit._clear()  # what is to be cleared away at the end is the launcher's, folders among it
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]
            weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
            out = [stdout.fileno()] * 2 if stdout is not None else [1, 2]
            os._exit(run(worker.main, command[2:], env, [os.open(os.devnull, os.O_RDONLY), *out]))

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for forking
    serve(*sys.argv[1:])
