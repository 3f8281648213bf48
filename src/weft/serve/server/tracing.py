"""Spans of OpenTelemetry, where it is installed and somebody has set it up; nothing where not.

FastAPI makes one of each HTTP request, below the caller's own (`traceparent`); in it stands the engine's work.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

from weft.serve.server.timing import Timing

# other packages may have put something below its name
INSTALLED = find_spec("opentelemetry") is not None and find_spec("opentelemetry.trace") is not None


def engine_span(model: str, timing: Timing, finish: str) -> None:
    """Of a request that has ended now, by the names of the conventions for generative AI."""
    if not INSTALLED:
        return
    from opentelemetry import trace

    now, request = time.monotonic(), timing.request
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.sampling.max_tokens, "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": timing.tokens.total(), "gen_ai.response.finish_reasons": [finish],
    }  # fmt: skip
    if timing.first is not None:
        attributes["weft.queue_seconds"] = timing.started - timing.arrived
        attributes["weft.first_token_seconds"] = timing.first - timing.arrived
    end = time.time_ns()
    start = end - int((now - timing.arrived) * 1e9)
    trace.get_tracer("weft").start_span(f"generate {model}", start_time=start, attributes=attributes).end(end)
