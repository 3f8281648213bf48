"""The files of the playground, as they lie here: no build step, and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {
    "/" if file.name == "page.html" else f"/playground/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in TYPES
}
"""By route. They need no API key: they hold nothing, and ask for one where the server wants it."""

HEADERS = {
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "; ".join(
        [
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src data:",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
            # text stays text: not even our own script can make elements of it
            "require-trusted-types-for 'script'", "trusted-types 'none'",
        ]
    ),
}  # fmt: skip


def playground_router() -> APIRouter:
    """`/`, and what that page loads."""
    router = APIRouter()
    for route, file in FILES.items():
        router.add_api_route(route, serve_file(file), methods=["GET"])
    return router


def serve_file(file: Path) -> Callable[[], Awaitable[Response]]:
    answer = Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)

    async def get() -> Response:
        return answer

    return get
