"""/v1/embeddings: means of last hidden states. A decoder was not trained for it: good for a start, no more."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from weft.serve.requests.request import NumbersError
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError, HttpError
from weft.serve.server.openai.answers import JsonAnswer
from weft.serve.server.openai.asking import deadline
from weft.serve.server.openai.bodies import EmbeddingBody, read
from weft.serve.server.openai.completions import tokenize
from weft.serve.server.openai.models import check_ids


def embeddings_router(catalogue: Catalogue, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(http: HttpRequest) -> Response:
        body = await read(EmbeddingBody, http)
        hosted, version = catalogue.find(body.model)
        if body.dimensions not in (None, version.shape.hidden):
            raise FieldError(f"dimensions: this model's embeddings have {version.shape.hidden} numbers", "dimensions")
        config.limits.check_count("inputs", len(body.input), config.limits.prompts)
        prompts = await tokenize(body.input, version)
        for prompt in prompts:
            check_ids(prompt, version)
            if not prompt:
                raise FieldError("an input is empty; give it at least one token", "input")
        futures: list[Future[list[float]]] = []
        with hosted.meter.refusals():
            hosted.shares.take(http.state.tenant, len(prompts))
        try:
            with hosted.meter.refusals():
                for prompt in prompts:
                    futures.append(version.desk.embed(prompt, version.adapter))
            async with asyncio.timeout(deadline(body.timeout, http, config) - time.monotonic()):
                vectors = [await asyncio.wrap_future(future) for future in futures]
        except NumbersError as error:
            raise HttpError(500, str(error), "bad_numbers") from None
        except TimeoutError:
            headers = {"x-should-retry": "false"}
            raise HttpError(408, "the deadline passed before all embeddings were there", "deadline", headers) from None
        finally:
            hosted.shares.give_back(http.state.tenant, len(prompts))
            for future in futures:
                future.cancel()
        count = sum(map(len, prompts))
        return JsonAnswer(
            {
                "object": "list",
                "data": [entry(number, vector, body) for number, vector in enumerate(vectors)],
                "model": version.model,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            },
            version,
        )

    return router


def entry(number: int, vector: list[float], body: EmbeddingBody) -> dict[str, Any]:
    found: list[float] | str = vector
    if body.encoding_format == "base64":
        found = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": number, "embedding": found}
