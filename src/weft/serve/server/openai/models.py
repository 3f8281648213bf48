"""/v1/models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError, LongFieldError
from weft.serve.server.hosted import Hosted
from weft.serve.server.openai.answers import JsonAnswer
from weft.serve.server.openai.bodies import DetokenizeBody, TokenizeBody, read
from weft.serve.server.openai.chats import tokenize_chat
from weft.serve.server.version import Version


def models_router(catalogue: Catalogue, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        ready = [hosted for hosted in catalogue.models.values() if hosted.ready]
        names = [name for hosted in ready for name in (hosted.name, *hosted.config.engine.adapters)]
        return JsonAnswer({"object": "list", "data": [card(*catalogue.find(name)) for name in names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if not name:
            return await models()
        hosted, version = catalogue.find(name)
        return JsonAnswer(card(hosted, version), version)

    @router.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        body = await read(TokenizeBody, http)
        _, version = catalogue.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise FieldError("give either prompt or messages", "prompt")
        if body.prompt is not None:
            tokens = await version.need_words().encode(body.prompt, version.max_context, body.add_special_tokens)
        else:
            tokens = await tokenize_chat(body, version, config)
        table: dict[str, Any] = {"count": len(tokens), "max_model_len": version.max_context, "tokens": tokens}
        if body.return_token_strs:
            table["token_strs"] = [version.need_words().text_of(token) for token in tokens]
        return JsonAnswer(table, version)

    @router.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        body = await read(DetokenizeBody, http)
        _, version = catalogue.find(body.model)
        check_ids(body.tokens, version)
        return JsonAnswer({"prompt": version.need_words().decode(body.tokens, skip_special=False)}, version)

    return router


def card(hosted: Hosted, version: Version) -> dict[str, Any]:
    """An adapter's has the model that it is of as `parent`, as vLLM's; `sampling` is what holds where a request says
    nothing, if that is not OpenAI's own."""
    return {
        "id": version.model, "object": "model", "created": version.created, "owned_by": "weft", "root": hosted.name,
        "parent": hosted.name if version.adapter else None, "version": version.number,
        "max_model_len": version.max_context, "sampling": dict(version.sampling),
    }  # fmt: skip


def check_ids(tokens: list[int], version: Version) -> None:
    """
    Raises:
        FieldError: there are more than the context holds, or one is outside of the vocabulary.
    """
    if len(tokens) > version.max_context:
        raise LongFieldError(f"{len(tokens)} tokens; the context holds {version.max_context}", "tokens")
    if tokens and not 0 <= min(tokens) <= max(tokens) < version.shape.vocab:
        raise FieldError(f"tokens has one outside the model's vocabulary of {version.shape.vocab}", "tokens")
