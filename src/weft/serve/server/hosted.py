"""One model under one name: its engine now, the next one beside it, and what brings a dead one back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, TypeVar

from weft.config.load import read_text
from weft.serve.desk import DeadError
from weft.serve.folder import find_model
from weft.serve.requests.request import Request
from weft.serve.server.config import ModelConfig, ServerConfig
from weft.serve.server.errors import UnloadedError
from weft.serve.server.forms import Forms
from weft.serve.server.gate import compare
from weft.serve.server.loading import Loading
from weft.serve.server.metrics import Meter, Metrics
from weft.serve.server.outputs import Outputs
from weft.serve.server.shares import Shares
from weft.serve.server.statistics import Statistics
from weft.serve.server.version import Version

log = logging.getLogger("weft.serve")

State = Literal["LOADING", "READY", "UNAVAILABLE"]
Made = TypeVar("Made")

PAUSES = (0.2, 1.0, 5.0, 15.0, 30.0)
"""Seconds before each attempt to bring an engine back; the last one again and again."""

WATCH_SECONDS = 0.1

GRACE_SECONDS = 15.0
"""How long replaced weights take requests still: of those that came before, and are being tokenized or given a form."""


class Hosted:
    """A model that is served. To be used in one event loop.

    Attributes:
        name: by which clients ask for it.
        state: LOADING at first; READY; UNAVAILABLE: unloaded, or its engine died and is not back yet.
        reason: why it is not ready.
        restarts: engines that died.
        meter: counts its requests.
        shares: who has how many of its places.
        forms: compiles what its requests' texts must look like.
        statistics: how those of KServe went.
        loading: what comes in just now.
    """

    def __init__(self, config: ModelConfig, server: ServerConfig, metrics: Metrics) -> None:
        self.config, self.server, self.name = config, server, config.name
        self.meter = Meter(config.name, metrics)
        self.statistics = Statistics()
        self.loading = Loading(config, server.apart)
        room = config.engine.max_sequences + config.engine.max_waiting
        self.shares = Shares(server.most_per_key(room))
        self.forms = Forms(self.shares, room, self.meter)
        metrics.states[config.name] = lambda: self._current.desk.stats() if self._current is not None else None
        self.state: State = "LOADING"
        self.reason = "loading"
        self.restarts = 0
        self._current: Version | None = None
        self._count = 0
        self._busy_since = time.monotonic()
        self._changing = asyncio.Lock()
        self._change: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._leaving: dict[asyncio.Task[bool], Version] = {}
        self._gate_text = read_text(server.gate_text) if server.gate_text else None

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def current(self) -> Version:
        """What new requests go to.

        Raises:
            DeadError: nothing, at the moment.
        """
        if self._current is None:
            raise (UnloadedError if self.unloaded else DeadError)(f"{self.name}: {self.reason}")
        return self._current

    @property
    def ready(self) -> bool:
        return self.state == "READY"

    @property
    def unloaded(self) -> bool:
        return self.reason == "unloaded"

    @property
    def hung(self) -> bool:
        """Whether there has been work, and no step, for long."""
        if self._current is None or not self._current.desk.num_live:
            return False
        last = max(self._current.desk.last_step, self._busy_since)
        return time.monotonic() - last > self._current.desk.patience(self.server.hang_seconds)

    @property
    def healthy(self) -> bool:
        """Whether its engine lives and moves."""
        return self.ready and self._current is not None and self._current.desk.error is None and not self.hung

    def check_room(self, tenant: str | None = None) -> None:
        """
        Args:
            tenant: which key asks; None: the server itself.

        Raises:
            RefusedError: it takes no request now, or none of this key.
        """
        if self._current is not None:
            with self.meter.refusals():
                self.shares.check(tenant)
                self._current.desk.check_room()

    # -- requests ----------------------------------------------------------------------------------------------------

    def outputs(
        self, requests: Sequence[Request], version: Version | None = None, tenant: str | None = None
    ) -> Outputs:  # fmt: skip
        """Begin several requests; their outputs, as they come, under `with` or `aclosing`: leaving cancels the rest.

        Args:
            tenant: which key asks; None: the server itself.

        Raises:
            ValueError, RefusedError, DeadError: as Desk.submit; then none was begun.
        """
        version = version or self.current
        if not version.desk.num_live:
            self._busy_since = time.monotonic()
        places = sum(request.n for request in requests)
        with self.meter.refusals():
            self.shares.take(tenant, places)
        try:
            return Outputs(version.desk, requests, self.meter, partial(self.shares.give_back, tenant))
        except BaseException:
            self.shares.give_back(tenant, places)
            raise

    # -- coming and going --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load it, if somebody else has not meanwhile, and watch over it.

        Raises:
            ValueError: there is no model there, or its settings cannot be.
            DeadError: it was closed meanwhile.
        """

        async def change() -> None:
            if self.ready:
                return
            self.state, self.reason = "LOADING", "loading"
            try:
                self._take(await self._load(self.config.path))
            except BaseException as error:
                self.state, self.reason = "UNAVAILABLE", str(error)
                raise

        await self._make(change)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def refresh(self, folder: Path | None = None) -> Version | None:
        """Take newer weights: a run's newest checkpoint, where that is not what is served already (then None).

        The engine of the new ones is built beside the present one, which goes on; the gate compares the two; then new
        requests go to the new one, and those that are in end where they began.

        Args:
            folder: take these, whatever is newest.

        Raises:
            ValueError: they cannot be loaded, or do not pass the gate; the present ones go on.
            DeadError: there are no present ones at the moment, or it was closed meanwhile.
        """

        async def change() -> Version | None:
            nonlocal folder
            present = self.current
            folder = folder or find_model(self.config.path)[0]
            if folder == present.folder:
                return None
            newer = await self._load(folder)
            try:
                await self._judge(present, newer)
            except BaseException:
                await asyncio.to_thread(newer.desk.close)
                raise
            self._take(newer)
            self._leave(present, self.server.request_seconds, GRACE_SECONDS)  # nobody in it can have longer
            log.warning("%s: version %s is served: %s", self.name, newer.number, folder)
            return newer

        return await self._make(change)

    async def _make(self, change: Callable[[], Coroutine[Any, Any, Made]]) -> Made:
        """One change after the other. `close` waits for none: what it finds under way is given up."""
        async with self._changing:
            self._change = task = asyncio.create_task(change())
            try:
                return await task
            except asyncio.CancelledError:
                if (me := asyncio.current_task()) is not None and me.cancelling():
                    raise
                raise DeadError(f"{self.name}: it was unloaded meanwhile") from None

    async def _judge(self, present: Version, newer: Version) -> None:
        """
        Raises:
            ValueError: the newer weights are worse.
        """
        verdict = await compare(present, newer, self._gate_text)
        log.warning("%s: %s: %s", self.name, newer.folder, verdict)
        allowed = self.server.gate
        if allowed is not None and verdict.worse > allowed:
            raise ValueError(
                f"{newer.folder} is not served: {verdict}, and --gate allows {allowed:g}; what was served goes on"
            )

    async def close(self, drain_seconds: float = 0.0, reason: str = "unloaded") -> bool:
        """Take no more requests, let those that are in end, and let go of the weights; whether all ended in time."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._change is not None:
            self._change.cancel()
        async with self._changing:
            version, self._current = self._current, None
            self.state, self.reason = "UNAVAILABLE", reason
        versions = [*self._leaving.values(), *([version] if version is not None else [])]
        for task in list(self._leaving):
            task.cancel()
        return all(await asyncio.gather(*(self._leave(version, drain_seconds) for version in versions)))

    async def _load(self, path: Path) -> Version:
        """A new version, whose engine runs; nobody knows it yet."""
        folder, desk, words, template, advised = await self.loading.load(path)
        desk.start()
        return Version(self.name, str(self._count + 1), folder, desk, words, template, advised)

    def _take(self, version: Version) -> None:
        """From now on, new requests go there."""
        self._count = int(version.number)
        self._current, self.state, self.reason = version, "READY", ""

    def _leave(self, version: Version, drain_seconds: float, grace: float = 0.0) -> asyncio.Task[bool]:
        """Let a version's requests end, and then itself; whether all ended in time."""

        async def leave() -> bool:
            await asyncio.sleep(grace)
            return await version.desk.drain(drain_seconds)

        task = asyncio.create_task(leave(), name=f"drain {self.name}")
        self._leaving[task] = version
        task.add_done_callback(self._leaving.pop)
        return task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._current is not None and self._current.desk.error is not None:
                await self._revive(self._current)

    async def _revive(self, dead: Version) -> None:
        """Build the same weights' engine again, until one lives; the newest ones', where a run has let go of those."""
        log.error("%s: the engine died and will be started again: %s", self.name, dead.desk.error)
        self._current, self.state, self.reason = None, "UNAVAILABLE", "the engine died and is being started again"
        self.restarts += 1
        try:
            await asyncio.to_thread(dead.desk.close)
        except Exception as error:  # noqa: BLE001 (what is dead may not even end well; its place is free all the same)
            log.error("%s: the dead engine did not end: %s", self.name, error)
        for attempt, pause in enumerate(chain(PAUSES, repeat(PAUSES[-1])), start=1):
            await asyncio.sleep(pause)
            async with self._changing:
                if self.ready:
                    return  # a client had it loaded
                try:
                    version = await self._load(dead.folder if dead.folder.is_dir() else self.config.path)
                except Exception as error:  # noqa: BLE001 (whatever it is, another attempt follows)
                    log.error("%s: attempt %d to start the engine again failed: %s", self.name, attempt, error)
                    self.reason = "the engine died, and starting it again failed"
                    continue
                self._take(replace(version, number=dead.number) if version.folder == dead.folder else version)
                log.warning("%s: the engine is back", self.name)
                return
