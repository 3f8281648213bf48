"""An engine in a process of its own, from outside (`inside.py` is the process). Torch-free.

What an engine keeps in books for every token, and what a server writes for it, is Python; of one process only one thread
computes any at a time. Two processes do both at once, and neither waits for the other. Whoever asks does not see it:
`EngineProcess` is what `EngineLoop` is.

Both ways messages are short tuples, pickled, whose first part says what they are. What came of a step is one message.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from weft.serve.config import EngineConfig
from weft.serve.cut.workers import Workers
from weft.serve.desk import DeadError, Desk
from weft.serve.requests.forms import KEPT, Form, Kind, text_of
from weft.serve.requests.request import RefusedError, Request
from weft.serve.stats import Stats


class EngineError(RuntimeError):
    """What an engine in another process failed of."""


class EngineProcess(Desk):
    """Made, it is loaded: that takes as long as reading the weights.

    Attributes:
        workers: the process, watched.
    """

    def __init__(self, folder: Path, config: EngineConfig, draft: Path | None = None) -> None:
        """
        Args:
            folder: as Engine.load.

        Raises:
            ValueError: as Engine.load.
            EngineError: it failed otherwise; its process has said more on stderr.
        """
        self._pipe, theirs = Pipe()
        what = f"{theirs.fileno()}, {str(folder)!r}, {config!r}, {draft and str(draft)!r}"
        code = (
            "from weft.serve.cut.workers import start_beating; start_beating(beat); "
            f"from weft.serve.config import EngineConfig; from weft.serve.inside import main; main({what})"
        )
        self.workers = Workers([code], names=["the engine's process"], files=[theirs.fileno()])
        theirs.close()
        try:
            kind, told = self._receive()
        except BaseException:
            self.workers.kill()
            raise
        if kind != "about":
            self.workers.kill()
            raise ValueError(told) if kind == "refused" else EngineError(told)
        super().__init__(told)
        self._stats, self._patience = self._receive()
        self._outbox: SimpleQueue[Any] = SimpleQueue()  # a process that stands still holds nobody up
        self._numbers, self._asked = count(), dict[int, Future[Any]]()
        self._forms = Forms(self._ask)
        self._threads = [
            threading.Thread(target=work, name=f"weft-engine-{name}", daemon=True)
            for name, work in (("read", self._read), ("write", self._write))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self.workers.watch(self.fail)

    @property
    def grammars(self) -> Forms:
        if not self.about.has_text:
            raise ValueError("structured output needs a tokenizer, and the model's folder has no tokenizer.json")
        return self._forms

    def stats(self) -> Stats:
        return self._stats

    def patience(self, most: float) -> float:
        return min(most, self._patience)

    def embed(self, prompt: list[int], adapter: str | None = None) -> Future[list[float]]:
        with self._changed:
            self._check_open()
            if len(self._asked) > self.about.config.max_waiting:
                raise RefusedError(f"{len(self._asked)} requests are waiting already", retry_after=1.0)
        return self._ask("embed", prompt, adapter)

    def close(self) -> None:
        with self._changed:
            self._closing = True
        if self._threads[1].ident is not None:
            self._outbox.put(("close",))  # where it failed too: it has processes and memory of its own to let go of
            self.workers.wait()
        self.workers.kill()
        self._outbox.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._pipe.close()
        self._end_all()

    def _hand_in(self, message: Request | str) -> None:
        self._outbox.put(("cancel", message) if isinstance(message, str) else ("submit", message))

    def _ask(self, *question: Any) -> Future[Any]:
        """Whoever cancels the future before it is answered has given the question up."""
        number, future = next(self._numbers), Future[Any]()
        self._asked[number] = future

        def over(future: Future[Any]) -> None:
            if future.cancelled() and self._asked.pop(number, None) is not None:
                self._outbox.put(("give up", number))

        future.add_done_callback(over)
        self._outbox.put(("ask", number, *question))
        if self.error is not None or self._closing:
            self._give_up()
        return future

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineError(str(self.workers.cause(error))) from None

    def _read(self) -> None:
        """The process's messages, until it ends: `workers` tells of that."""
        try:
            while True:
                kind, *told = self._pipe.recv()
                if kind == "step":
                    outputs, self._stats = told
                    self._tell(outputs)
                elif kind == "failed":
                    self.fail(EngineError(*told))
                elif kind == "patience":
                    [self._patience] = told
                else:
                    self._answer(*told)
        except (EOFError, OSError):
            pass
        except Exception as error:  # noqa: BLE001 (told to every request; nothing else ever would)
            self.fail(error)

    def _answer(self, number: int, value: Any, error: Exception | None) -> None:
        future = self._asked.pop(number, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def _write(self) -> None:
        with suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)

    def _end_all(self) -> None:
        super()._end_all()
        self._give_up()

    def _give_up(self) -> None:
        for number in list(self._asked):
            self._answer(number, None, DeadError("the engine has ended"))


class Forms:
    """Has forms compiled where the engine is. May be used by any thread; what it makes is a form's name."""

    def __init__(self, ask: Callable[..., Future[Any]]) -> None:
        self._ask = ask
        self._kept: OrderedDict[Form, None] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: Kind, source: str | dict[str, Any] = "", timeout: float = 10.0) -> Form:
        """As GrammarCompiler.compile."""
        form = Form(kind, text_of(source))
        if self.kept(kind, form.text) is None:
            self._ask("compile", kind, form.text, timeout).result()
            with self._lock:
                self._kept[form] = None
                while len(self._kept) > KEPT // 2:  # the process has more: whatever is known here is known there
                    self._kept.popitem(last=False)
        return form

    def kept(self, kind: Kind, text: str) -> Form | None:
        """As GrammarCompiler.kept."""
        form = Form(kind, text)
        with self._lock:
            if form not in self._kept:
                return None
            self._kept.move_to_end(form)
        return form
