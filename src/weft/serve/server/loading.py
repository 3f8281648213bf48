"""A model on its way in: read by a thread, for whoever still wants it when it is there."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from weft.serve.apart import EngineProcess
from weft.serve.config import EngineConfig
from weft.serve.desk import Desk
from weft.serve.folder import advised_sampling, find_model, load_tokenizer
from weft.serve.server.chat import ChatTemplate, find_template
from weft.serve.server.config import ModelConfig
from weft.serve.server.words import Words

log = logging.getLogger("weft.serve")

Loaded = tuple[Path, Desk, Words | None, ChatTemplate | None, dict[str, float]]


class Loading:
    """To be used in one event loop.

    Args:
        apart: engines have processes of their own.
    """

    def __init__(self, config: ModelConfig, apart: bool) -> None:
        self.config, self.apart = config, apart
        self._threads: set[asyncio.Task[Loaded]] = set()

    @property
    def under_way(self) -> bool:
        """Whether a thread reads, be it for nobody: it cannot be ended."""
        return bool(self._threads)

    async def load(self, path: Path) -> Loaded:
        """
        Raises:
            ValueError: there is no model there, or its settings cannot be.
        """
        thread = asyncio.create_task(asyncio.to_thread(load, self.config, path, self.apart))
        self._threads.add(thread)
        thread.add_done_callback(self._threads.discard)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:  # the thread goes on, and nobody would know what it makes
            thread.add_done_callback(let_go)
            raise


def load(config: ModelConfig, path: Path, apart: bool) -> Loaded:
    folder, damage = find_model(path)
    for finding in damage:
        log.warning("%s: passed over a damaged checkpoint: %s", config.name, finding)
    template, advised = find_template(folder, config.chat_template), advised_sampling(folder)
    make = apart_from_here if apart else here
    desk, tokenizer = make(folder, config.engine, config.draft)
    return folder, desk, Words(tokenizer) if tokenizer is not None else None, template, advised


def apart_from_here(folder: Path, config: EngineConfig, draft: Path | None) -> tuple[Desk, Any]:
    """An engine in a process of its own, and the tokenizer, of which that one has another."""
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return EngineProcess(folder, config, draft), tokenizer


def here(folder: Path, config: EngineConfig, draft: Path | None) -> tuple[Desk, Any]:
    """An engine on a thread of this process, which has to have torch then, and its tokenizer."""
    from weft.serve.engine import Engine
    from weft.serve.loop import EngineLoop

    engine = Engine.load(folder, config, draft)
    return EngineLoop(engine), engine.tokenizer


def let_go(thread: asyncio.Task[Loaded]) -> None:
    """What was loaded, and is not wanted any more."""
    if not thread.cancelled() and thread.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, thread.result()[1].close)
