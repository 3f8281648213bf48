"""What went wrong, in each protocol's words: one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from weft.serve.desk import DeadError
from weft.serve.requests.request import Output, RefusedError, TooLongError

FAILED = "the engine failed while it worked on this request; it is coming back"


TOO_LONG = "this model's maximum context length is exceeded"
"""OpenAI's words, by which litellm knows such an error; others go by its code."""


class UnknownModelError(LookupError):
    """No model has this name."""


class UnloadedError(DeadError):
    """Somebody had the model unloaded: it comes back when somebody wants it back."""


class HttpError(Exception):
    """What the way in refuses, whatever the model: no key, a body too large, a route that is none.

    Attributes:
        status: of HTTP.
        code: for programs.
        headers: that go with the answer.
    """

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class FieldError(ValueError):
    """A field of a request is not as it must be.

    Attributes:
        param: the way to the field, as in messages.0.role.
    """

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class LongFieldError(FieldError, TooLongError):
    """A field of a request says more than the context has room for."""


def cut_off(output: Output, begun: bool) -> HttpError | None:
    """What is wrong with an answer that ended so; None: nothing.

    Args:
        begun: whether it has any token.
    """
    if output.finish == "cancelled":
        return HttpError(503, "the server is shutting down: the answer was cut off", "draining", {"retry-after": "5"})
    if output.finish == "deadline" and not begun:
        words = "the deadline passed before the first token"
        return HttpError(408, words, "deadline", {"x-should-retry": "false"})
    if output.finish != "error":
        return None
    if output.error == FAILED:
        return HttpError(503, FAILED, "engine_failed", {"retry-after": "1"})
    if output.error and output.error.startswith("the text could not follow its form"):
        return HttpError(400, output.error, "form")
    return HttpError(500, output.error or FAILED, "bad_numbers")


@dataclass(frozen=True)
class Problem:
    """An error as clients see it.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        grpc: name of gRPC's status.
        param: the field that is wrong.
        retry_after: seconds after which to try again; None: never the same.
    """

    status: int
    message: str
    kind: str
    code: str | None
    grpc: str
    param: str | None = None
    retry_after: float | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def openai(self) -> dict[str, Any]:
        """The body of OpenAI's answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kserve(self) -> dict[str, Any]:
        """The body of KServe's answer."""
        return {"error": self.message}

    def body(self, path: str) -> dict[str, Any]:
        """The body for a client of this route."""
        return self.kserve if path == "/v2" or path.startswith("/v2/") else self.openai

    @property
    def all_headers(self) -> dict[str, str]:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return headers


HTTP_KINDS = {
    400: ("invalid_request_error", "INVALID_ARGUMENT"),
    401: ("authentication_error", "UNAUTHENTICATED"),
    403: ("permission_error", "PERMISSION_DENIED"),
    404: ("invalid_request_error", "NOT_FOUND"),
    405: ("invalid_request_error", "UNIMPLEMENTED"),
    408: ("timeout_error", "DEADLINE_EXCEEDED"),
    413: ("invalid_request_error", "RESOURCE_EXHAUSTED"),
    415: ("invalid_request_error", "INVALID_ARGUMENT"),
    429: ("rate_limit_error", "RESOURCE_EXHAUSTED"),
    500: ("server_error", "INTERNAL"),
    503: ("service_unavailable_error", "UNAVAILABLE"),
}


def problem(error: BaseException, draining: bool = False) -> Problem:
    """What a client is told. Whatever is not foreseen is an internal error, and says nothing about us.

    Args:
        draining: the server is stopping: a refusal is no longer the client's hurry.
    """
    if isinstance(error, HttpError):
        kind, grpc = HTTP_KINDS[error.status]
        return Problem(error.status, str(error), kind, error.code, grpc, headers=tuple(error.headers.items()))
    if isinstance(error, RefusedError):
        if draining:
            return Problem(
                503, str(error), "service_unavailable_error", "draining", "UNAVAILABLE", None, error.retry_after
            )
        return Problem(429, str(error), "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED", None, error.retry_after)
    if isinstance(error, DeadError):
        why = "it was unloaded" if isinstance(error, UnloadedError) else "it is coming back"
        words = f"the model is not being served at the moment; {why}"
        return Problem(503, words, "service_unavailable_error", "not_ready", "UNAVAILABLE", None, 1.0)
    if isinstance(error, UnknownModelError):
        return Problem(404, str(error.args[0]), "invalid_request_error", "model_not_found", "NOT_FOUND", "model")
    if isinstance(error, ValueError):
        param = error.param if isinstance(error, FieldError) else None
        if isinstance(error, TooLongError):
            words, code = f"{error} ({TOO_LONG})", "context_length_exceeded"
            return Problem(400, words, "invalid_request_error", code, "INVALID_ARGUMENT", param)
        return Problem(400, str(error), "invalid_request_error", None, "INVALID_ARGUMENT", param)
    return Problem(500, "internal error", "server_error", "internal_error", "INTERNAL")
