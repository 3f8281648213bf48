"""Start the processes of a run on this machine. Torch-free.

Why not torch's elastic agent, here, where all processes are on one machine and none is restarted: the agent imports
torch before any worker starts; picks the store's port by binding and closing it, so that another process may take it;
waits 30 s for the peers of a failed rank before it says which one failed; and on a second Ctrl-C leaves its workers
behind. Over several machines the agent is the tool: `torchrun -m weft.launch.worker ...` runs the same workers.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from weft.launch.cores import num_cores
from weft.launch.failure import describe, failure_file, first_cause, log_file
from weft.launch.watch import kill_all, received_signals, wait_all
from weft.launch.worker import LAUNCHER, LOGS, Entry, load_entry

LISTEN_FD = "WEFT_STORE_FD"
"""The number, in rank 0, of the open socket on which the processes' store listens."""


def launch(
    world: int,
    entry: str | Entry,
    args: Sequence[str] = (),
    *,
    logs: Path,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run `entry(args)` in `world` processes of this machine; a single one runs right here.

    Rank 0 has the terminal. What the others write goes to `logs/rankN.log`. The first cause of a failure is shown once,
    on stderr. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to each process, once; a second one ends them all.
    If this process is killed, so are they.

    Args:
        entry: a function of an importable module, or its name, `package.module:function`; it returns an exit code, or
            None for 0.
        env: added to the environment of the processes.

    Returns:
        0: all went well; 2: a mistake of the user; 1: anything else. With one process, exceptions pass through instead.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the processes before there was anything to save, as it ends a single one.
    """
    if world == 1:
        function = load_entry(entry) if isinstance(entry, str) else entry
        return function(list(args)) or 0
    name = entry if isinstance(entry, str) else f"{entry.__module__}:{entry.__qualname__}"
    logs.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        failure_file(logs, rank).unlink(missing_ok=True)
        if (log := log_file(logs, rank)).exists():
            log.replace(log.with_suffix(".previous.log"))
    processes: list[subprocess.Popen[bytes]] = []
    with received_signals() as received:
        try:
            _start(processes, world, [sys.executable, "-m", "weft.launch.worker", name, *args], logs, env or {})
            end = wait_all(processes, received, logs)
        finally:
            kill_all(processes)
    if end.stopped:
        print(f"weft: {end.stopped}", file=sys.stderr)
        return 1
    if not end.failures:
        return 0
    cause = first_cause(end.failures)
    print(describe(cause, end.failures, world, logs), file=sys.stderr)
    return 2 if cause.user else 1


def _start(
    processes: list[subprocess.Popen[bytes]], world: int, command: list[str], logs: Path, env: Mapping[str, str]
) -> None:
    # The store's port is ours from here on: rank 0 inherits the open socket, not a number that others could take
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, world)) as listener:
        shared = {
            **_defaults(world),
            **os.environ,
            **env,
            LAUNCHER: str(os.getpid()),
            LOGS: str(logs),
            LISTEN_FD: str(listener.fileno()),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        for rank in range(world):
            with ExitStack() as stack:
                out = None if rank == 0 else stack.enter_context(open(log_file(logs, rank), "wb"))
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        pass_fds=(listener.fileno(),) if rank == 0 else (),
                        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
                    )
                )


def _defaults(world: int) -> dict[str, str]:
    """Environment that the user's own settings go over."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {
        "OMP_NUM_THREADS": str(max(1, num_cores() // world)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else each lost connection is a page of C++ frames on the terminal
        **({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}),
    }
