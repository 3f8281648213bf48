"""The way back: what the engine gives, as Triton's responses.

The engine's thread puts outputs down and goes on. One thread says them to Triton, and asks it who has gone away: a
response is a round trip between processes, in which the next step can already run. What piles up meanwhile for one request
goes out as one response.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from weft.serve.requests.request import Output

ASK_SECONDS = 0.1
"""How often Triton is asked whether a request was cancelled."""


FAILED = "the engine failed, and is started again"


class Sender(Protocol):
    """One request's way into Triton."""

    def send(self, outputs: list[Output], last: bool) -> None:
        """A response with all of these."""

    def fail(self, kind: str, why: str) -> None:
        """An error, and the end. `kind` is one of Triton's: INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED."""

    def cancelled(self) -> bool:
        """Whether nobody wants it any more. Not to be asked after the end."""


class Reply:
    """Outputs of one request that Triton has not been told.

    Args:
        stream: tell them as they come; otherwise all at the end.
        queue: of the thread that does.
        n: completions, which all have to end.
    """

    def __init__(self, id: str, sender: Sender, stream: bool, queue: queue.Queue[Reply | None], n: int = 1) -> None:
        self.id, self.sender, self.stream, self.queue = id, sender, stream, queue
        self.ended = False
        self.to_tell = n  # ends that Triton has not been told
        self._to_come = n  # ends that the engine has not told
        self._outputs: deque[Output] = deque()
        self._queued = False

    def deliver(self, output: Output) -> None:
        """On the engine's thread."""
        self._outputs.append(output)
        self._to_come -= output.finish is not None
        if (self.stream or not self._to_come) and not self._queued:
            self._queued = True
            self.queue.put(self)

    def take(self) -> list[Output]:
        """What is to be told now; what comes from here on is queued again."""
        self._queued = False
        if not (self.stream or not self._to_come):
            return []
        taken = [self._outputs.popleft() for _ in range(len(self._outputs))]
        self.to_tell -= sum(output.finish is not None for output in taken)
        return taken


class Replies:
    """The thread.

    Args:
        cancel: ends the request of an id.
        also: what else is to be said to Triton from time to time, and by no other thread.
    """

    def __init__(self, cancel: Callable[[str], None], also: Callable[[], None] = lambda: None) -> None:
        self.cancel, self.also = cancel, also
        self.queue: queue.Queue[Reply | None] = queue.Queue()
        self._live: dict[str, Reply] = {}
        self._thread = threading.Thread(target=self._work, name="weft-replies", daemon=True)
        self._thread.start()

    def make(self, id: str, sender: Sender, stream: bool, n: int = 1) -> Reply:
        return Reply(id, sender, stream, self.queue, n)

    def watch(self, reply: Reply) -> None:
        """The engine took it in: from now on its sender is this thread's alone."""
        self.queue.put(reply)

    def close(self) -> None:
        """Say what is queued, and stop."""
        self.queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        asked = time.monotonic()
        while True:
            try:
                reply = self.queue.get(timeout=ASK_SECONDS)
                if reply is None:
                    return
                self._say(reply)
            except queue.Empty:
                pass
            if time.monotonic() - asked >= ASK_SECONDS:
                for id, live in list(self._live.items()):
                    if live.sender.cancelled():
                        self.cancel(id)
                self.also()
                asked = time.monotonic()

    def _say(self, reply: Reply) -> None:
        if reply.ended:
            return
        self._live[reply.id] = reply
        outputs = reply.take()
        if not outputs:
            return
        failed = next((one for one in outputs if one.finish in ("error", "cancelled")), None)
        if failed is not None or not reply.to_tell:
            reply.ended = True
            del self._live[reply.id]
        if failed is None:
            reply.sender.send(outputs, reply.ended)
        elif failed.finish == "error":
            self.cancel(reply.id)  # its other completions
            why = failed.error or ""  # an engine's last words are for the log, not for whoever asks
            reply.sender.fail("INTERNAL", FAILED if why.startswith("the engine failed") else why)
        else:
            reply.sender.fail("CANCELLED", "the request was cancelled")


def values_of(outputs: list[Output], logprobs: bool, ends: list[str | None]) -> dict[str, list[Any]]:
    """What a response holds: output tensor → its elements.

    Args:
        ends: why each completion ended; one that goes on: None. Kept from one response to the next, here.
    """
    each: list[list[Output]] = [[] for _ in ends]
    for output in outputs:
        each[output.index].append(output)
        ends[output.index] = output.finish or ends[output.index]
    values: dict[str, list[Any]] = {
        "text_output": ["".join(output.text for output in mine) for mine in each],
        "output_ids": [token for mine in each for output in mine for token in output.tokens],
    }
    if len(each) > 1:
        values["lengths"] = [sum(len(output.tokens) for output in mine) for mine in each]
    if all(ends):
        values["finish_reason"] = list(ends)
    if logprobs:
        values["logprobs"] = [one.logprob for mine in each for output in mine for one in output.logprobs or ()]
    for output in outputs:
        if output.prompt_logprobs is not None:
            values["prompt_logprobs"] = [one.logprob for one in output.prompt_logprobs if one is not None]
    return values
