"""/v1/models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError
from weft.serve.server.hosted import Hosted
from weft.serve.server.openai.answers import JsonAnswer
from weft.serve.server.openai.bodies import DetokenizeBody, TokenizeBody, read
from weft.serve.server.openai.chats import tokenize_chat
from weft.serve.server.version import Version


def models_router(catalogue: Catalogue, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return JsonAnswer({"object": "list", "data": [card(one) for one in catalogue.models.values() if one.ready]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        hosted = catalogue.get(name)
        return JsonAnswer(card(hosted), hosted.current)

    @router.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        body = await read(TokenizeBody, http)
        version = catalogue.get(body.model).current
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
        version = catalogue.get(body.model).current
        check_ids(body.tokens, version)
        return JsonAnswer({"prompt": version.need_words().decode(body.tokens, skip_special=False)}, version)

    return router


def card(hosted: Hosted) -> dict[str, Any]:
    """
    Raises:
        DeadError: the model is not served at the moment.
    """
    version = hosted.current
    return {
        "id": hosted.name, "object": "model", "created": version.created, "owned_by": "weft", "root": hosted.name,
        "version": version.number, "max_model_len": version.max_context,
    }  # fmt: skip


def check_ids(tokens: list[int], version: Version) -> None:
    """
    Raises:
        FieldError: there are more than the context holds, or one is outside of the vocabulary.
    """
    if len(tokens) > version.max_context:
        raise FieldError(f"{len(tokens)} tokens; the context holds {version.max_context}", "tokens")
    if tokens and not 0 <= min(tokens) <= max(tokens) < version.shape.vocab:
        raise FieldError(f"tokens has one outside the model's vocabulary of {version.shape.vocab}", "tokens")
