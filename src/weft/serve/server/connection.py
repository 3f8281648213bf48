"""One connection: uvicorn's, with an end to patience."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from weft.serve.server.door import Door
from weft.serve.server.errors import HttpError, problem
from weft.serve.server.limits import Limits


class FloodError(Exception):
    """More headers, or pieces of a body, than a request needs."""


class Connection(HttpToolsProtocol):
    """What a route could not see: headers that come slowly or without end, bodies in crumbs, clients that do not read.

    Args:
        limits: header_bytes, chunks, receive_seconds (until the headers are there; the body has as long again),
            stall_seconds.
        most: connections at once; one more is closed.
        door: who is turned away.
    """

    def __init__(self, *args: Any, limits: Limits, most: int, door: Door, **more: Any) -> None:
        super().__init__(*args, **more)
        self.limits, self.most, self.door = limits, most, door
        self._refusal: bytes | None = None
        self._head_bytes = self._chunks = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._chunks = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:  # no request before it waits for its answer
            self._refusal = self.door.turn_away(self.parser.get_method(), self.url, self.headers)
        if self._refusal is None:
            super().on_headers_complete()
        else:
            self._expect_head()  # the body has as long

    def on_body(self, body: bytes) -> None:
        if self._refusal is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refusal is None:
            super().on_message_complete()
            return
        self._stop_waiting()
        goes_on = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        head = STATUS_LINE[429] + (b"" if goes_on else b"connection: close\r\n")
        self.transport.write(head + self._refusal)
        self._refusal = None
        if goes_on:
            self.on_response_complete()
        else:
            self.transport.close()

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self.limits.chunks:
            raise FloodError

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP is told so as JSON too; whatever asked is not asked again."""
        body = json.dumps(problem(HttpError(400, msg, "invalid_http")).openai).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.receive_seconds, self.transport.abort)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.header_bytes:
            raise FloodError
