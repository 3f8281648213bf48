"""The process that an engine has of its own: its loop, and a thread that reads what is wanted of it (`apart.py`)."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from weft.serve.config import EngineConfig
from weft.serve.desk import DeadError
from weft.serve.engine import Engine
from weft.serve.loop import EngineLoop
from weft.serve.requests.forms import HELPERS, Form, Kind
from weft.serve.requests.request import Output, RefusedError, Request

PATIENCE_SECONDS = 0.5
"""How often it says how long its step may take."""


def main(pipe: int, folder: str, config: EngineConfig, draft: str | None) -> None:
    """The process."""
    connection = Connection(pipe)
    try:
        engine = Engine.load(Path(folder), config, Path(draft) if draft else None)
    except ValueError as error:
        connection.send(("refused", str(error)))
        return
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise
    Inside(engine, connection).serve()


class Inside:
    """The engine's loop, and a thread that reads what is wanted of it."""

    def __init__(self, engine: Engine, pipe: Connection) -> None:
        self.loop, self.pipe = EngineLoop(engine, self._told), pipe
        self._outputs: list[Output] = []  # of a step
        self._sending = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._compiling = ThreadPoolExecutor(4 * HELPERS, thread_name_prefix="weft-forms")

    def serve(self) -> None:
        """Until it is told to end, or nobody is there to tell."""
        self._send("about", self.loop.about)
        self._send(self.loop.stats(), math.inf)
        self.loop.start()
        threading.Thread(target=self._tell_patience, name="weft-patience", daemon=True).start()
        with suppress(EOFError):
            while (message := self.pipe.recv())[0] != "close":
                kind, *told = message
                if kind == "submit":
                    self._submit(*told)
                elif kind == "cancel":
                    self.loop.cancel(*told)
                elif kind == "ask":
                    self._ask(*told)
                elif (asked := self._asked.pop(told[0], None)) is not None:
                    asked.cancel()
        self.loop.close()

    def _submit(self, request: Request) -> None:
        try:
            if isinstance(form := request.grammar, Form):
                request = replace(request, grammar=self.loop.grammars.compile(form.kind, form.text))
            self.loop.submit(request, self._outputs.append)
        except (ValueError, RefusedError) as error:
            ends = [Output(request.id, index, finish="error", error=str(error)) for index in range(request.n)]
            self._send("step", ends, self.loop.stats())
        except DeadError:
            pass  # which has been told

    def _ask(self, number: int, what: str, *told: Any) -> None:
        def answer(future: Future[Any]) -> None:
            if self._asked.pop(number, None) is not None:
                error = future.exception()
                value = future.result() if error is None and what == "embed" else None
                self._send("answer", number, value, error)

        try:
            future = self.loop.embed(*told) if what == "embed" else self._compiling.submit(self._compile, *told)
        except (RefusedError, DeadError) as error:
            self._send("answer", number, None, error)
            return
        self._asked[number] = future
        future.add_done_callback(answer)

    def _compile(self, kind: Kind, text: str, timeout: float) -> None:
        self.loop.grammars.compile(kind, text, timeout)

    def _told(self) -> None:
        outputs, self._outputs[:] = list(self._outputs), ()
        if (error := self.loop.error) is None:
            self._send("step", outputs, self.loop.stats())
        else:  # whatever state it is in
            self._send("failed", f"{type(error).__name__}: {error}")

    def _tell_patience(self) -> None:
        while True:
            time.sleep(PATIENCE_SECONDS)
            if self.loop.num_live:
                self._send("patience", self.loop.patience(math.inf))

    def _send(self, *message: Any) -> None:
        with self._sending, suppress(OSError):  # nobody may be there any more
            self.pipe.send(message)
