"""Alive, ready, generating: three questions, three answers."""

from __future__ import annotations

import asyncio
import secrets
import time

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from weft.serve.requests.request import RefusedError, Request, Sampling
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.hosted import Hosted

GENERATE_SECONDS = 10.0
"""In which one token must come. Its request goes before all others."""

FIRST = -(2**31)


def health_router(catalogue: Catalogue) -> APIRouter:
    """`/health/live`: the process answers, and no engine hangs: if not, start it again. `/health/ready` (and `/health`):
    every model takes requests: if not, send them elsewhere. `/health/generate`: every model gives a token just now. A
    model that somebody had unloaded is not missed."""
    router = APIRouter()
    probes: dict[str, asyncio.Task[bool]] = {}

    @router.get("/health/live")
    async def live() -> Response:
        return answer(catalogue.live, "live", "hung")

    @router.get("/health/ready")
    @router.get("/health")
    async def ready() -> Response:
        return answer(catalogue.ready, "ready", "draining" if catalogue.draining else "not ready")

    @router.get("/health/generate")
    async def generating() -> Response:
        """Probes that come while one runs share its answer: they never pile up."""
        wanted = catalogue.wanted
        for name, model in wanted.items():
            if name not in probes or probes[name].done():
                probes[name] = asyncio.create_task(generate(model))
        found = {name: await asyncio.shield(probes[name]) for name in wanted}
        good = bool(found) and all(found.values())
        return JSONResponse(
            {"status": "generating" if good else "not generating", "models": found}, 200 if good else 503
        )

    return router


def answer(good: bool, yes: str, no: str) -> Response:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)


async def generate(model: Hosted) -> bool:
    """Whether one token comes, and is a number."""
    deadline = time.monotonic() + GENERATE_SECONDS
    request = Request(f"probe-{secrets.token_hex(8)}", [0], Sampling(max_tokens=1), priority=FIRST, deadline=deadline)
    try:
        async with asyncio.timeout(GENERATE_SECONDS + 1):
            with model.outputs([request]) as outputs:
                return [output.finish async for output in outputs] == ["length"]
    except RefusedError:
        return model.healthy  # busy is not broken
    except (RuntimeError, ValueError, TimeoutError):
        return False
