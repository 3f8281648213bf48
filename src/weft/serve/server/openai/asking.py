"""From what a client asks to requests for the engine."""

from __future__ import annotations

import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from weft.serve.requests.forms import Kind
from weft.serve.requests.request import Request, Sampling
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError
from weft.serve.server.hosted import Hosted
from weft.serve.server.keys import check_priority
from weft.serve.server.openai.bodies import Generation
from weft.serve.server.version import Version

if TYPE_CHECKING:
    from weft.serve.requests.request import Compiled

TIMEOUT_HEADER = "x-request-timeout"


def make_requests(
    body: Generation, prompts: list[list[int]], max_tokens: int, version: Version, config: ServerConfig, http: HttpRequest,
    *, n: int, logprobs: int | None, prompt_logprobs: int | None, grammar: Compiled | None, special: bool,
) -> list[Request]:  # fmt: skip
    """One request for each prompt.

    Args:
        max_tokens: of one completion; 0 computes one, which is not told.
        special: special tokens are in the text.

    Raises:
        ValueError: more than this server takes, or than the model can.
        HttpError: the key's requests may not go before others'.
    """
    check_priority(config, http.state.tenant, body.priority)
    limits = config.limits
    limits.check_count("completions (prompts × n)", len(prompts) * n, limits.completions)
    limits.check_stops(body.stop)
    limits.check_count("stop_token_ids", len(body.stop_token_ids), limits.biases)
    limits.check_count("tokens in logit_bias", len(body.logit_bias), limits.biases)
    sampling = make_sampling(body, max(1, max_tokens), version, special)
    told = 0
    for prompt in prompts:
        room = max(1, min(sampling.max_tokens, version.max_context - len(prompt)))
        told += room * n * (1 + logprobs) if logprobs is not None else 0
        told += len(prompt) * (1 + prompt_logprobs) if prompt_logprobs is not None else 0
    limits.check_count("log-probabilities in one answer", told, limits.told)
    until = deadline(body.timeout, http, config)
    return [
        Request(
            f"{http.state.request_id}-{secrets.token_hex(6)}", prompt, sampling, n, body.priority, until, http.state.tenant,
            body.cache_salt, version.adapter, logprobs, prompt_logprobs, grammar,
        )
        for prompt in prompts
    ]  # fmt: skip


def make_sampling(body: Generation, max_tokens: int, version: Version, special: bool) -> Sampling:
    """
    Raises:
        FieldError: a setting is out of its bounds.
    """

    def chosen(name: str) -> Any:
        """The client's, or what the model's makers advise, or what it is where nobody says."""
        own = getattr(body, name)
        return own if name in body.model_fields_set else version.sampling.get(name, own)

    top_k = chosen("top_k")
    try:
        return Sampling(
            temperature=chosen("temperature"), top_k=None if top_k in (0, -1) else top_k, top_p=chosen("top_p"),
            seed=body.seed, max_tokens=max_tokens, stop=tuple(body.stop), eos=version.eos, min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"), frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty, bias=body.logit_bias, stop_ids=tuple(body.stop_token_ids),
            min_tokens=body.min_tokens, ignore_eos=body.ignore_eos, special=special,
        )  # fmt: skip
    except ValueError as error:
        name = str(error).partition(" ")[0]
        raise FieldError(str(error), name if name in Generation.model_fields else None) from None


def deadline(asked: float | None, http: HttpRequest, config: ServerConfig) -> float:
    """When a request ends at the latest: the earliest of what its field, its header and the server say."""
    seconds = [config.request_seconds] + ([asked] if asked is not None else [])
    if header := http.headers.get(TIMEOUT_HEADER):
        try:
            seconds.append(float(header))
        except ValueError:
            raise FieldError(f"the header {TIMEOUT_HEADER} is {header[:32]!r}; it must be seconds", None) from None
    for given in seconds:
        if not given > 0:
            raise FieldError(f"the time for this request is {given} s; it must be above 0", "timeout")
    return time.monotonic() + min(seconds)


async def make_grammar(
    body: Generation, hosted: Hosted, version: Version, http: HttpRequest, forced: dict[str, Any] | None = None
) -> Compiled | None:
    """The form that the answer must have.

    Args:
        forced: the JSON schema of the calls that it has to make.

    Raises:
        ValueError: there are several.
        ValueError, RefusedError, HttpError: as Forms.compile.
    """
    forms = list(asked_forms(body)) + ([("json_schema", forced)] if forced is not None else [])
    if not forms:
        return None
    if len(forms) > 1:
        raise ValueError("the answer can have one form: leave all but one of response_format, structured_outputs, "
                         "guided_… and a forced tool_choice out")  # fmt: skip
    [(kind, source)] = forms
    left = deadline(body.timeout, http, hosted.server) - time.monotonic()
    return await hosted.forms.compile(version.desk.grammars, kind, source, http.state.tenant, left)


def asked_forms(body: Generation) -> list[tuple[Kind, str | dict[str, Any]]]:
    """OpenAI's and vLLM's ways to ask for a form."""
    forms: list[tuple[Kind, str | dict[str, Any]]] = []
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        forms.append(("json", ""))
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise FieldError("response_format.json_schema is missing", "response_format.json_schema")
        forms.append(("json_schema", wanted.json_schema.form))
    more = body.structured_outputs
    for kind, source in (
        ("json_schema", body.guided_json), ("regex", body.guided_regex), ("lark", body.guided_grammar),
        ("regex", one_of(body.guided_choice)),
        *([("json_schema", more.form), ("regex", more.regex), ("lark", more.grammar), ("regex", one_of(more.choice)),
           ("json", "" if more.json_object else None)] if more else ()),
    ):  # fmt: skip
        if source is not None:
            forms.append((kind, source))
    return forms


def one_of(choices: list[str] | None) -> str | None:
    if choices is not None and not choices:
        raise ValueError("a choice among no texts cannot be made")
    return "|".join(f"({re.escape(choice)})" for choice in choices) if choices else None
