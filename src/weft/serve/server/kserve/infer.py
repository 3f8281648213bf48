"""A call, run: from a client's words to the engine's request, and from its outputs to responses."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from weft.serve.requests.forms import form_of
from weft.serve.requests.request import Output, Request, Sampling
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import UnknownModelError, cut_off
from weft.serve.server.hosted import Hosted
from weft.serve.server.keys import check_priority
from weft.serve.server.kserve.call import Call, Response, answer
from weft.serve.server.version import Version

if TYPE_CHECKING:
    from weft.serve.requests.request import Compiled

__all__ = ["infer", "version_of", "whole"]


def version_of(hosted: Hosted, asked: str) -> Version:
    """
    Args:
        asked: a version's number; "": whichever there is.

    Raises:
        UnknownModelError: it is not the present one.
        DeadError: there is none at the moment.
    """
    version = hosted.current
    if asked not in ("", version.number):
        raise UnknownModelError(f"{hosted.name} has no version {asked[:64]!r}; it has {version.number}")
    return version


async def infer(
    call: Call, hosted: Hosted, asked: str, config: ServerConfig, tenant: str, adapter: str | None = None
) -> AsyncGenerator[Response]:  # fmt: skip
    """The responses of a call: one, or where it streams as many as the engine's outputs. Leaving early cancels it.

    Args:
        asked: the version that is asked for; "": the present one.

    Raises:
        ValueError, RefusedError, DeadError, UnknownModelError: before the first response.
        HttpError: the engine failed, the server stops, or the time was up before the first token; if it is up later, what
            there is by then is the answer, and the reason of its end is "deadline".
    """
    with hosted.statistics.request() as clock:
        version = version_of(hosted, asked)
        version = version.under(adapter) if adapter else version
        hosted.check_room(tenant)  # before the prompt is tokenized: in a rush, refusals must be cheap
        request = await make_request(call, hosted, version, config, tenant)
        clock.read = time.monotonic()
        kept: list[Output] = []
        begun, prefix = False, call.prefix
        with hosted.outputs([request], version, tenant) as outputs:
            async for output in outputs:
                clock.began = clock.began or output.started
                begun = begun or bool(output.tokens)
                if error := cut_off(output, begun):
                    raise error
                kept.append(output)
                if output.finish is not None or call.stream:
                    start = time.monotonic()
                    yield Response(version.number, answer(kept, call.wanted, prefix), output.finish is not None)
                    clock.written += time.monotonic() - start
                    kept.clear()
                    prefix = ""


async def whole(
    call: Call, hosted: Hosted, asked: str, config: ServerConfig, tenant: str, adapter: str | None = None
) -> Response:
    """The one response of a call that does not stream.

    Raises:
        ValueError: it does; else as `infer`.
    """
    if call.stream:
        raise ValueError("stream: only generate_stream and ModelStreamInfer give more than one response; leave it out")
    async with aclosing(infer(call, hosted, asked, config, tenant, adapter)) as responses:
        [response] = [one async for one in responses]
    return response


async def make_request(call: Call, hosted: Hosted, version: Version, config: ServerConfig, tenant: str) -> Request:
    """What the engine is asked.

    Raises:
        ValueError: the call asks for what is not possible, or for more than the server's limits.
        HttpError: the key's requests may not go before others'.
        ValueError, RefusedError, HttpError: as Forms.compile.
    """
    check_priority(config, tenant, call.priority)
    settings = call.settings
    config.limits.check_stops(settings.get("stop", ()))
    config.limits.check_count("stop_token_ids", len(settings.get("stop_token_ids", ())), config.limits.biases)
    sampling = Sampling(**call.sampling(version.eos))
    logprobs, prompt_logprobs = call.alternatives(""), call.alternatives("prompt_")
    prompt = await _prompt(call, version)
    told = min(sampling.max_tokens, version.max_context) * (1 + logprobs) if logprobs is not None else 0
    told += len(prompt) * (1 + prompt_logprobs) if prompt_logprobs is not None else 0
    config.limits.check_count("log-probabilities in one answer", told, config.limits.told)
    latest = time.monotonic() + config.request_seconds
    until = min(latest, call.deadline or latest)
    return Request(
        f"kserve-{secrets.token_hex(8)}", prompt, sampling, priority=call.priority, deadline=until, tenant=tenant,
        adapter=version.adapter, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        grammar=await _grammar(call, hosted, version, tenant, until),
    )  # fmt: skip


async def _prompt(call: Call, version: Version) -> list[int]:
    text = call.settings.get("text_input")
    if (text is None) == ("input_ids" not in call.settings):
        raise ValueError("give the prompt as text_input or as input_ids, one of the two")
    if text is None:
        return list(call.settings["input_ids"])
    return await version.need_words().encode(text, version.max_context)


async def _grammar(call: Call, hosted: Hosted, version: Version, tenant: str, until: float) -> Compiled | None:
    form = form_of(call.settings)
    if form is None:
        return None
    version.need_words()
    return await hosted.forms.compile(version.desk.grammars, *form, tenant, until - time.monotonic())
