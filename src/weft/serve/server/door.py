"""The door: whoever there is no room for is told so before anything is made of his request.

Under a rush this is the most frequent answer by far, and it is given by the Python that the engine's bookkeeping needs too.
So it takes no task, no application and one write; whatever is not plain goes the usual way in (`guard.py`), which comes to
the same.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache

from weft.serve.desk import DeadError
from weft.serve.requests.request import RefusedError
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.errors import HttpError, problem
from weft.serve.server.keys import Keys

GENERATING = {"/v1/completions", "/v1/chat/completions"}
"""Routes that are refused here, where the only model's queue is full."""

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Door:
    """
    Args:
        catalogue: of the server; with several models, the body would have to be read to tell whose queue is meant.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue, self._keys = catalogue, Keys(catalogue.config.api_keys)
        self._answers = catalogue.metrics.answers.labels("429")
        self._places = {path.encode() for path in GENERATING}

    def turn_away(self, method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """All of an answer but its status line and what it says of the connection; None: come in.

        Args:
            headers: names in lower case.
        """
        catalogue = self.catalogue
        if method != b"POST" or url not in self._places or len(catalogue.models) != 1 or catalogue.draining:
            return None
        named = dict(headers)
        length = named.get(b"content-length", b"")
        if not length.isdigit() or int(length) > catalogue.config.limits.body_bytes or b"expect" in named:
            return None
        try:
            tenant = self._keys.tenant(named.get(b"authorization", b"").decode("latin-1"))
            catalogue.get(None).check_room(tenant)
        except (HttpError, DeadError):  # which the guard tells
            return None
        except RefusedError as error:
            message, seconds = str(error), math.ceil(error.retry_after)
        else:
            return None
        self._answers.inc()
        return header_lines(own_headers(named.get(b"x-request-id", b"").decode("latin-1"))) + refusal(message, seconds)


@lru_cache(maxsize=128)
def refusal(message: str, seconds: int) -> bytes:
    """What is the same in many: the last headers, and the body.

    Args:
        seconds: after which to try again.
    """
    told = problem(RefusedError(message, seconds))
    body = json.dumps(told.openai).encode()
    found = {"content-type": "application/json", "content-length": str(len(body)), **told.all_headers}
    return header_lines(found) + b"\r\n" + body


def header_lines(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def own_headers(given: str) -> dict[str, str]:
    """That every answer has.

    Args:
        given: the id that the client gives its request; taken, if it is one.
    """
    request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
    return {"x-request-id": request_id, "x-content-type-options": "nosniff"}
