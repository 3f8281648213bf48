"""Requests that no engine should begin. Torch-free."""

from __future__ import annotations

from collections.abc import Collection

from weft.serve.requests.request import MAX_LOGPROBS, Request, TooLongError


def check_request(
    request: Request, vocab: int, max_context: int, queue: int, has_text: bool, adapters: Collection[str] = ()
) -> None:
    """
    Args:
        queue: completions that an engine takes in at most.
        has_text: whether there is a tokenizer.
        adapters: their names.

    Raises:
        ValueError: says what cannot be done, and what to change.
    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise ValueError("the prompt is empty; give the model at least one token to continue")
    if len(prompt) >= max_context:
        raise TooLongError(
            f"the prompt has {len(prompt)} tokens; the context holds {max_context}, the new ones included: "
            "shorten the prompt"
        )
    ids = {"the prompt": prompt, "logit bias": list(sampling.bias), "the list of stop ids": sampling.stop_ids}
    for where, tokens in ids.items():
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            raise ValueError(f"{where} has a token outside the model's vocabulary of {vocab}")
    if not 1 <= request.n <= queue:
        raise ValueError(f"n is {request.n}; it must be at least 1, and at most {queue}, which the queue holds")
    if request.n > 1 and sampling.temperature == 0:
        raise ValueError(f"n is {request.n}, but every completion is the same at temperature 0: set temperature")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        if value is not None and not 0 <= value <= MAX_LOGPROBS:
            raise ValueError(f"{name} is {value}; it must be from 0 to {MAX_LOGPROBS}")
    if request.adapter is not None and request.adapter not in adapters:
        raise ValueError(f"adapter is {request.adapter!r}; this engine has {', '.join(adapters) or 'none'}")
    if sampling.stop and not has_text:
        raise ValueError("stop texts need a tokenizer, and the model's folder has no tokenizer.json")
    if request.grammar is not None and sampling.min_tokens:
        raise ValueError("min_tokens would go on where the form of the text says that it ends: leave one of them out")
