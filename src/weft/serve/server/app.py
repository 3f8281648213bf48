"""The application: which routes there are."""

from __future__ import annotations

from fastapi import FastAPI

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.guard import Guard
from weft.serve.server.health import health_router
from weft.serve.server.kserve.metrics import TritonMetrics
from weft.serve.server.kserve.routes import kserve_router
from weft.serve.server.openai.chats import chats_router
from weft.serve.server.openai.completions import completions_router
from weft.serve.server.openai.embeddings import embeddings_router
from weft.serve.server.openai.models import models_router
from weft.serve.server.playground.router import playground_router


def make_app(catalogue: Catalogue, config: ServerConfig) -> FastAPI:
    """The server's HTTP side. What is included here is what there is: no page that describes routes, no debug."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(health_router(catalogue))
    app.include_router(completions_router(catalogue, config))
    app.include_router(chats_router(catalogue, config))
    app.include_router(embeddings_router(catalogue, config))
    app.include_router(models_router(catalogue, config))
    app.include_router(kserve_router(catalogue))
    catalogue.metrics.registry.register(TritonMetrics(catalogue))
    app.include_router(catalogue.metrics.router())
    app.include_router(playground_router())
    app.add_middleware(Guard, catalogue=catalogue, config=config, routes=app.routes)
    return app
