"""All models of a server, by name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from weft.serve.folder import find_model
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import UnknownModelError
from weft.serve.server.hosted import Hosted, State
from weft.serve.server.metrics import Metrics
from weft.serve.server.version import Version

log = logging.getLogger("weft.serve")


class Entry(NamedTuple):
    """What the index says of a model, or of an adapter."""

    name: str
    version: str
    state: State
    reason: str


class Catalogue:
    """The models that the server's settings name. Clients may come and go by these names; never by a path.

    Attributes:
        models: by name, the first one first; those that are unloaded too.
        adapters: the model that each is of, by its name.
        started: all of them have been loaded once.
        draining: the server is stopping, and takes no more requests.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.models = {model.name: Hosted(model, config, self.metrics) for model in config.models}
        self.adapters = {name: hosted for hosted in self.models.values() for name in hosted.config.engine.adapters}
        self.started = self.draining = False
        self._changes: set[asyncio.Task[None]] = set()
        self._refused: dict[str, Path] = {}  # checkpoints that were not taken, by model
        self._wrong: dict[str, str] = {}  # what was wrong when newer ones were last looked for

    async def start(self, loaded: Callable[[Hosted], None] | None = None) -> None:
        """Load all models, one after the other: each wants the whole disk.

        Args:
            loaded: called with each that is there.

        Raises:
            ValueError: as Hosted.start; those that are loaded are let go again.
        """
        try:
            for hosted in self.models.values():
                await hosted.start()
                if loaded is not None:
                    loaded(hosted)
            self.started = True
        except BaseException:
            await self.close(0.0)
            raise

    def get(self, name: str | None) -> Hosted:
        """The model of this name; the first one where there is no name.

        Raises:
            UnknownModelError: no model has it.
        """
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModelError(f"the model {name[:256]!r} does not exist; GET /v1/models lists those that do")
        return self.models[name]

    def find(self, name: str | None) -> tuple[Hosted, Version]:
        """The model of this name, or that has an adapter of this name, and what answers its requests now.

        Raises:
            UnknownModelError: there is neither.
            DeadError: nothing answers, at the moment.
        """
        hosted, adapter = self.host(name)
        return hosted, hosted.current.under(adapter) if adapter else hosted.current

    def host(self, name: str | None) -> tuple[Hosted, str | None]:
        """The model of this name; or that has an adapter of this name, and the adapter.

        Raises:
            UnknownModelError: there is neither.
        """
        return (self.adapters[name], name) if name in self.adapters else (self.get(name), None)

    @property
    def ready(self) -> bool:
        """Whether every model that is not unloaded answers, and none hangs."""
        return not self.draining and all(model.ready and not model.hung for model in self.wanted.values())

    @property
    def wanted(self) -> dict[str, Hosted]:
        """Those that nobody had unloaded."""
        return {name: model for name, model in self.models.items() if not model.unloaded}

    @property
    def live(self) -> bool:
        """Whether nothing hangs: False means that only a new process will help."""
        return not any(model.hung for model in self.models.values())

    def index(self) -> list[Entry]:
        """All that can be asked by a name, each model before its adapters, which come and go with it."""
        return [
            Entry(name, model.current.number if model.ready else "", model.state, model.reason)
            for of, model in self.models.items()
            for name in (of, *model.config.engine.adapters)
        ]

    async def load(self, name: str) -> None:
        """Load a model that was unloaded; one that is loaded takes newer weights, if its path has any.

        Raises:
            UnknownModelError: no model has this name.
            ValueError: it is an adapter's; or as Hosted.start and Hosted.swap.
        """
        hosted = self._whole(name)

        async def load() -> None:
            await (hosted.refresh() if hosted.ready else hosted.start())

        await self._change(load())

    async def refresh(self, asked: bool = True) -> None:
        """Have every model take its newest checkpoint. One that cannot goes on with what it has, and the log says why.

        Args:
            asked: somebody wants it now: he is told where nothing is newer, and what was not taken before is tried again.
        """
        for hosted in filter(lambda one: one.ready, self.models.values()):
            newest = None
            try:
                newest, _ = find_model(hosted.config.path)
                if not asked and newest == self._refused.get(hosted.name):
                    continue
                if await hosted.refresh(newest) is None and asked:
                    log.warning("%s: there is nothing newer than %s", hosted.name, newest)
                self._wrong.pop(hosted.name, None)
            except (ValueError, RuntimeError, OSError) as error:
                if asked or self._wrong.get(hosted.name) != str(error):  # whoever looks every second says it once
                    log.error("%s: %s", hosted.name, error)
                self._wrong[hosted.name] = str(error)
                if newest is not None and isinstance(error, ValueError):
                    self._refused[hosted.name] = newest

    async def unload(self, name: str) -> None:
        """Let a model's requests end, and its weights go.

        Raises:
            UnknownModelError: no model has this name.
            ValueError: it is an adapter's.
        """
        hosted = self._whole(name)

        async def unload() -> None:
            await hosted.close(self.config.drain_seconds)

        await self._change(unload())

    def _whole(self, name: str) -> Hosted:
        if name in self.adapters:
            raise ValueError(f"{name} is an adapter of {self.adapters[name].name}, and comes and goes with it")
        return self.get(name or "?")

    async def _change(self, change: Coroutine[Any, Any, None]) -> None:
        """To its end, though whoever asked for it hangs up: half of one would leave an engine that nobody knows."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def close(self, drain_seconds: float) -> bool:
        """Stop: what is unfinished after so many seconds is cancelled; whether nothing was."""
        self.draining = True
        done = await asyncio.gather(
            *(model.close(drain_seconds, "the server is stopping") for model in self.models.values())
        )
        return all(done)
