"""The way in: what every request passes before any route sees it, and every answer on its way out.

In this order: is there such a route; whose page asks, if one does; has it a key; is there room; has the body come in whole,
in time, and not too large.
Then the route runs, as long as its client is there: whoever hangs up has cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig, is_loopback
from weft.serve.server.door import GENERATING, own_headers
from weft.serve.server.errors import HttpError, Problem, problem
from weft.serve.server.keys import Keys
from weft.serve.server.metrics import Metrics
from weft.serve.server.playground.router import FILES

log = logging.getLogger("weft.serve")

OPEN = {"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", *FILES}
"""Routes that need no key: probes have none, and a page asks for one. They say yes or no, and of nothing else."""

METHODS = {"GET": "GET, HEAD", "POST": "POST"}
"""Those of all routes, and what goes where each goes."""

KNOWN = 256
"""Places that are remembered: there are fewer, but some name something."""

NO_ROUTE = (
    "there is no such route: of OpenAI's there are completions, chat/completions, embeddings and models, below /v1; of "
    "KServe's those below /v2"
)
"""For whoever left /v1 out, or asks for what OpenAI's servers do besides (/v1/responses)."""


class Guard:
    """ASGI middleware, the outermost.

    `scope["state"]` gets `tenant` (which key came; "" where none is needed) and `request_id`.

    Args:
        routes: the allow-list: what is not in there is not there.
    """

    def __init__(self, app: ASGIApp, catalogue: Catalogue, config: ServerConfig, routes: Sequence[BaseRoute]) -> None:
        self.app, self.catalogue, self.config, self.routes = app, catalogue, config, routes
        self._known: set[tuple[str, str]] = set()  # methods and paths that were found
        self._keys = Keys(config.api_keys)
        self._live = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the same, and the connection leaves the body out
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        own = own_headers(headers.get("x-request-id", ""))
        request_id = own["x-request-id"]
        answer = Answer(send, own, self.catalogue.metrics)
        self._live += 1
        try:
            self._find(scope)
            self._check_origin(headers.get("origin", ""))
            tenant = "" if scope["path"] in OPEN else self._keys.tenant(headers.get("authorization", ""))
            scope.setdefault("state", {}).update(tenant=tenant, request_id=request_id)
            self._check_room(scope["path"], tenant)
            body = await self._body(headers, receive)
            await self._run(scope, body, receive, answer)
        except Exception as error:
            told = problem(error, self.catalogue.draining)
            if told.status == 500:
                log.exception("%s: %s %s failed", request_id, scope["method"], scope["path"])
            if not answer.begun:
                await answer.refuse(told, scope["path"])
            elif told.status == 500:
                raise  # the connection is cut: half an answer must not look whole
        finally:
            self._live -= 1

    def _find(self, scope: Scope) -> None:
        place = scope["method"], scope["path"]
        if place in self._known:
            return
        if self._has(scope):
            if len(self._known) < KNOWN:
                self._known.add(place)
            return
        if allowed := [words for method, words in METHODS.items() if self._has({**scope, "method": method})]:
            words = f"{scope['method']} is not possible here"
            raise HttpError(405, words, "method_not_allowed", {"allow": ", ".join(allowed)})
        raise HttpError(404, NO_ROUTE, "unknown_route")

    def _has(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] == Match.FULL for route in self.routes)

    def _check_origin(self, origin: str) -> None:
        """Where there is no key, whoever gets a browser of this machine to take his page for ours (by a name of his that he
        has lead here) would be served: browsers say whose page it is."""
        if origin and not (self.config.api_keys or self.config.open or is_here(origin)):
            raise HttpError(
                403, "there is no API key, so pages from elsewhere are not served; weft serve --open serves them",
                "foreign_page",
            )  # fmt: skip

    def _check_room(self, path: str, tenant: str) -> None:
        if path in OPEN or path.startswith(("/health", "/metrics")):
            return
        if self.catalogue.draining:
            raise HttpError(503, "the server is shutting down", "draining", {"retry-after": "5", "connection": "close"})
        if self._live > self.config.max_connections:
            raise HttpError(503, "too many requests at once", "too_many_requests", {"retry-after": "1"})
        if path in GENERATING and len(self.catalogue.models) == 1:
            # before a byte of the body is read: in a rush, refusals must be cheap
            self.catalogue.get(None).check_room(tenant)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limits = self.config.limits
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.body_bytes:
            raise too_large(limits.body_bytes)
        pieces, size, more = [], 0, True
        try:
            async with asyncio.timeout(limits.receive_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(408, "the client went away", "disconnected", {"connection": "close"})
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    more = message.get("more_body", False)
                    if size > limits.body_bytes:
                        raise too_large(limits.body_bytes)
        except TimeoutError:
            raise HttpError(
                408, f"the request took more than {limits.receive_seconds:g} s to come in", "slow_request",
                {"connection": "close", "x-should-retry": "false"},
            ) from None  # fmt: skip
        return b"".join(pieces)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: Answer) -> None:
        """Run the route, until it ends or its client hangs up."""
        read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                await asyncio.Event().wait()  # a hang-up ends the route anyway
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        route = asyncio.ensure_future(self.app(scope, replay, answer.send))
        watch = asyncio.ensure_future(hang_up(receive))
        try:
            await asyncio.wait((route, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not route.done():
                route.cancel()
        with suppress(asyncio.CancelledError):
            await route


def is_here(origin: str) -> bool:
    """Whether a page of this origin comes from this machine."""
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


async def hang_up(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def too_large(most: int) -> HttpError:
    return HttpError(413, f"the body is larger than {most} bytes", "too_large", {"connection": "close"})


class Answer:
    """What goes back, with the headers that every answer has.

    Attributes:
        begun: whether a status has gone out.
    """

    def __init__(self, send: Send, own: dict[str, str], metrics: Metrics) -> None:
        self._send, self._metrics = send, metrics
        self._headers = [(name.encode(), value.encode()) for name, value in own.items()]
        self.begun = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._metrics.answers.labels(str(message["status"])).inc()
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)

    async def refuse(self, told: Problem, path: str) -> None:
        body = json.dumps(told.body(path)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **told.all_headers}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": told.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})
