"""KServe v2 over HTTP."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.errors import problem
from weft.serve.server.kserve import models
from weft.serve.server.kserve.call import Call
from weft.serve.server.kserve.call import Response as Inferred
from weft.serve.server.kserve.infer import infer, whole
from weft.serve.server.kserve.wire import LENGTH, inflate, read_generate, read_inference, read_object, write_generate
from weft.serve.server.openai.answers import dump, send_event
from weft.serve.server.openai.asking import deadline

__all__ = ["kserve_router"]

log = logging.getLogger("weft.serve")


def kserve_router(catalogue: Catalogue) -> APIRouter:
    """Every route under /v2."""
    router, config = APIRouter(prefix="/v2"), catalogue.config

    async def body_of(request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "").strip().lower()
        return inflate(await request.body(), encoding, config.limits.body_bytes)

    def timed(call: Call, request: Request) -> Call:
        """With the deadline that the request's headers and the server set, if that is earlier."""
        until = deadline(None, request, config)
        return replace(call, deadline=min(until, call.deadline or until))

    @router.get("")
    async def server() -> Response:
        return JSONResponse(models.server_metadata())

    @router.get("/health/live")
    async def live() -> Response:
        return Response(status_code=200 if catalogue.live else 503)

    @router.get("/health/ready")
    async def ready() -> Response:
        return Response(status_code=200 if catalogue.ready else 503)

    @router.get("/models/stats")
    async def all_statistics() -> Response:
        return JSONResponse(models.statistics(catalogue, "", ""))

    @router.post("/repository/index")
    async def index(request: Request) -> Response:
        return JSONResponse(models.index(catalogue, read_object(await body_of(request)).get("ready") is True))

    @router.post("/repository/models/{model}/load")
    async def load(model: str, request: Request) -> Response:
        await models.load(
            catalogue, model, read_object(await body_of(request)).get("parameters") or {}, request.state.tenant
        )
        return JSONResponse({})

    @router.post("/repository/models/{model}/unload")
    async def unload(model: str, request: Request) -> Response:
        await models.unload(catalogue, model, request.state.tenant)
        return JSONResponse({})

    async def metadata(model: str, version: str = "") -> Response:
        return JSONResponse(models.metadata(catalogue, model, version))

    async def model_ready(model: str, version: str = "") -> Response:
        return Response(status_code=200 if models.ready(catalogue, model, version) else 503)

    async def model_config(model: str, version: str = "") -> Response:
        return JSONResponse(models.config(catalogue, model, version))

    async def statistics(model: str, version: str = "") -> Response:
        return JSONResponse(models.statistics(catalogue, model, version))

    async def inference(request: Request, model: str, version: str = "") -> Response:
        hosted, adapter = catalogue.host(model)
        asked = read_inference(await body_of(request), request.headers.get(LENGTH))
        found = await whole(timed(asked.call, request), hosted, version, config, request.state.tenant, adapter)
        body, headers = asked.write(model, found.version, found.tensors)
        return Response(body, headers=headers | version_header(found.version))

    async def generate(request: Request, model: str, version: str = "") -> Response:
        hosted, adapter = catalogue.host(model)
        call = timed(read_generate(await body_of(request), stream=False), request)
        found = await whole(call, hosted, version, config, request.state.tenant, adapter)
        return JSONResponse(
            write_generate(call.id, model, found.version, found.tensors), headers=version_header(found.version)
        )

    async def generate_stream(request: Request, model: str, version: str = "") -> Response:
        hosted, adapter = catalogue.host(model)
        call = timed(read_generate(await body_of(request), stream=True), request)
        responses = infer(call, hosted, version, config, request.state.tenant, adapter)
        try:
            first = await anext(responses)  # what is refused is refused with a status of its own
        except BaseException:
            await responses.aclose()
            raise
        return Events(responses, first, call.id, model, catalogue)

    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "", metadata), ("GET", "/ready", model_ready), ("GET", "/config", model_config),
        ("GET", "/stats", statistics), ("POST", "/infer", inference), ("POST", "/generate", generate),
        ("POST", "/generate_stream", generate_stream),
    ]  # fmt: skip
    for method, path, answer in routes:
        for model in ("/models/{model}", "/models/{model}/versions/{version}"):
            router.add_api_route(model + path, answer, methods=[method], response_model=None)
    return router


def version_header(number: str) -> dict[str, str]:
    """That every answer of a model has."""
    return {"x-weft-version": number}


class Events(Response):
    """Server-sent events: one for each response of a call, and one that says what went wrong, if anything does."""

    def __init__(
        self, responses: AsyncGenerator[Inferred], first: Inferred, id: str, model: str, catalogue: Catalogue
    ) -> None:  # fmt: skip
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **version_header(first.version)}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.responses, self.first, self.id, self.model, self.catalogue = responses, first, id, model, catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.responses):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._tell(send, self.first)
                async for response in self.responses:
                    await self._tell(send, response)
            except Exception as error:
                told = problem(error, self.catalogue.draining)
                if told.status == 500:
                    log.exception("a stream failed")
                await send_event(send, dump(told.kserve))
            await send({"type": "http.response.body", "body": b""})

    async def _tell(self, send: Send, response: Inferred) -> None:
        await send_event(send, dump(write_generate(self.id, self.model, response.version, response.tensors)))
