"""The answer to one request of a client, as it comes: what completions and chats have in common."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.responses import Response

from weft.serve.requests.request import Output, Request
from weft.serve.server.hosted import Hosted
from weft.serve.server.openai.answers import EventAnswer, Events, JsonAnswer, Usage
from weft.serve.server.openai.bodies import Generation
from weft.serve.server.openai.logprobs import Namer
from weft.serve.server.outputs import Outputs
from weft.serve.server.version import Version


class Job(ABC):
    """
    Args:
        requests: what the engine is asked.
        prefix: of the answer's id.
        kind: of a stream's events, as OpenAI calls it.
    """

    def __init__(
        self, body: Generation, version: Version, requests: Sequence[Request], prefix: str, kind: str
    ) -> None:  # fmt: skip
        self.version, self.requests = version, requests
        self.stream, self.options = body.stream, body.stream_options
        self.shows_stop = body.include_stop_str_in_output
        self.namer = Namer(version.words)
        self.usage = Usage(sum(len(request.prompt) for request in requests))
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
            "model": version.model, "system_fingerprint": version.fingerprint,
        }  # fmt: skip

    async def answer(self, hosted: Hosted, tenant: str) -> Response:
        """Have the engine begin, and tell what comes of it, at the end or as it comes.

        Raises:
            ValueError, RefusedError, DeadError: as Hosted.outputs.
            HttpError: it was cut off.
        """
        outputs = hosted.outputs(self.requests, self.version, tenant)
        if self.stream:
            return EventAnswer(self.events(outputs), outputs, self.version)
        with outputs:
            return JsonAnswer(await self.whole(outputs), self.version)

    async def events(self, outputs: Outputs) -> Events:
        async for output in outputs.joined():
            for choice in self.parts(output):
                yield {**self.head, "choices": [choice], **self.usage.event(self.options)}
        if self.options.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage.table()}

    @abstractmethod
    def parts(self, output: Output) -> Iterator[dict[str, Any]]:
        """What a stream says of an output: a choice for each event.

        Raises:
            HttpError: it was cut off.
        """

    @abstractmethod
    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        """All of it at once.

        Raises:
            HttpError: it was cut off.
        """

    def text(self, output: Output) -> str:
        """With the stop text that ended it, where the client wants that."""
        stop = output.stopped_by if output.finish == "stop" else None
        return output.text + stop if self.shows_stop and isinstance(stop, str) else output.text

    def stop_reason(self, output: Output) -> str | int | None:
        """vLLM's: what ended it; None: the model itself, or nothing did."""
        return output.stopped_by if output.stopped_by not in self.version.eos else None
