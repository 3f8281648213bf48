"""What goes back to a client of OpenAI's routes: one JSON, or events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.serve.requests.request import Output
from weft.serve.server.errors import problem
from weft.serve.server.openai.bodies import StreamOptions
from weft.serve.server.outputs import Outputs
from weft.serve.server.version import Version

log = logging.getLogger("weft.serve")

Events = AsyncGenerator[dict[str, Any], None]


class Usage:
    """Tokens of a request's prompts and answers."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.completion, self.cached = prompt, 0, 0

    def count(self, output: Output, first: bool) -> None:
        self.completion += len(output.tokens)
        if first and output.index == 0:
            self.cached += output.cached

    def event(self, options: StreamOptions) -> dict[str, Any]:
        """What an event says of it that is not the last."""
        if options.continuous_usage_stats:
            return {"usage": self.table()}
        return {"usage": None} if options.include_usage else {}

    def table(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion, "prompt_tokens_details": {"cached_tokens": self.cached},
        }  # fmt: skip


class JsonAnswer(Response):
    """One JSON, with the version that it is of."""

    media_type = "application/json"

    def __init__(self, table: Any, version: Version | None = None, status: int = 200) -> None:
        super().__init__(dump(table), status, headers=version.headers if version else None)


class EventAnswer(Response):
    """Server-sent events, each a JSON; `[DONE]` is the last. What goes wrong on the way is an event with an error.

    However it ends, what the engine has not done yet is cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, outputs: Outputs, version: Version) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **version.headers})
        del self.headers["content-length"]
        self._events, self._outputs = events, outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._outputs:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for table in self._events:
                    await send_event(send, dump(table))
            except Exception as error:
                told = problem(error)
                if told.status == 500:
                    log.exception("a stream failed")
                await send_event(send, dump(told.openai))
            await send_event(send, b"[DONE]")
            await send({"type": "http.response.body", "body": b""})


async def send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


def dump(table: Any) -> bytes:
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
