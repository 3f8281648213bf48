"""A server from start to end: it listens, loads, answers, and lets requests end before it does."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import uvicorn

from weft.serve.desk import DeadError
from weft.serve.server.app import make_app
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.connection import Connection
from weft.serve.server.door import Door
from weft.serve.server.hosted import Hosted
from weft.serve.server.kserve.rpc import start_grpc

log = logging.getLogger("weft.serve")

KEEP_ALIVE_SECONDS = 65
"""How long an idle connection is kept: longer than clients and proxies do, so that they close it, and not we under them."""

LATE_SECONDS = 10
"""How long after the time for draining what hangs is waited for."""


class Server(uvicorn.Server):
    """uvicorn's, which lets the models' requests end when it stops."""

    def __init__(self, config: uvicorn.Config, catalogue: Catalogue) -> None:
        super().__init__(config)
        self.catalogue = catalogue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = self.catalogue.config.drain_seconds
        late = asyncio.get_running_loop().time() + seconds + LATE_SECONDS
        draining = asyncio.create_task(self.catalogue.close(seconds))
        await super().shutdown(sockets)
        await asyncio.wait([draining], timeout=max(0.0, late - asyncio.get_running_loop().time()))
        if not draining.done():
            log.error("an engine hangs: the server ends without it")
            os._exit(1)
        await draining
        self._captured_signals.clear()  # to stop when asked to is no failure


def listen(config: ServerConfig) -> socket.socket:
    """
    Raises:
        ValueError: the address is not this machine's, or is taken, or is not for everybody.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, proto=socket.IPPROTO_TCP)  # asyncio sends at once only on sockets that say TCP
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()  # two may bind one port, where none listens yet
    except OSError as error:
        listener.close()
        way_out = "; --port 0 takes a free port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}{way_out}") from None
    return listener


async def serve(
    config: ServerConfig, listening: Callable[[list[int]], None] | None = None,
    loaded: Callable[[Hosted], None] | None = None, ready: Callable[[], None] | None = None,
    stopped: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Until SIGTERM or Ctrl-C; then what is being answered has `drain_seconds` to end. SIGHUP looks for newer checkpoints.

    Args:
        listening: called with the port of HTTP and, where it is spoken, that of gRPC, before anything is loaded:
            `/health/live` says yes, `/health/ready` no.
        loaded: called with each model that is there.
        ready: called when all are.
        stopped: called when it has been told to end, and has.

    Raises:
        ValueError: a model cannot be loaded, or the port cannot be had.
    """
    listener = listen(config)
    catalogue = Catalogue(config)
    server = make_server(catalogue)
    loop = asyncio.get_running_loop()
    refreshes: set[asyncio.Task[None]] = set()

    def refresh() -> None:
        task = loop.create_task(catalogue.refresh())
        refreshes.add(task)
        task.add_done_callback(refreshes.discard)

    async def load() -> None:
        try:
            await catalogue.start(loaded)
        except BaseException:
            server.should_exit = True
            raise
        if ready is not None:
            ready()
        while config.follow_seconds is not None:
            await asyncio.sleep(config.follow_seconds)
            await catalogue.refresh(asked=False)

    loop.add_signal_handler(signal.SIGHUP, refresh)
    loading = asyncio.create_task(load())
    rpc, ports = None, [listener.getsockname()[1]]
    try:
        if config.grpc_port is not None:
            rpc, port = await start_grpc(catalogue, config)
            ports.append(port)
        if listening is not None:
            listening(ports)
        await server.serve(sockets=[listener])
    finally:
        if rpc is not None:
            await rpc.stop(grace=1.0)
        listener.close()
        loop.remove_signal_handler(signal.SIGHUP)
        if any(hosted.loading.under_way for hosted in catalogue.models.values()):
            stopped()
            os._exit(0)  # all have been answered, and a thread that reads weights cannot be ended
        loading.cancel()
    if not loading.cancelled() and loading.done():
        with suppress(DeadError):  # stopped while it loaded
            await loading
    stopped()


def make_server(catalogue: Catalogue) -> Server:
    config = catalogue.config
    settings = uvicorn.Config(
        make_app(catalogue, config),
        http=partial(  # type: ignore[arg-type]
            Connection, limits=config.limits, most=config.max_connections, door=Door(catalogue)
        ),
        ws="none", lifespan="off", log_config=None, log_level="error", access_log=False, server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=int(config.drain_seconds) + LATE_SECONDS,
    )  # fmt: skip
    return Server(settings, catalogue)
