"""Prompts in, completions out: the engine, for callers who have them all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weft.models.decoder import Decoder
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Output, Request, Sampling


def complete(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, config: EngineConfig | None = None
) -> list[list[int]]:
    """Token ids of prompts, of any lengths → the new token ids of each, the one that ended it included.

    Raises:
        ValueError: a prompt is empty, has a token that the model does not know, or leaves no room in its context.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    engine = Engine(model, None, config or EngineConfig(max_waiting=len(prompts)))
    for prompt, output in generate(engine, prompts, sampling):
        completions[prompt] += output.tokens
    return completions


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, adapter: str | None = None
) -> Iterator[tuple[int, Output]]:
    """(index of the prompt, output) as they come, of `n` completions of each prompt, with an adapter of the engine's.

    Raises:
        ValueError: as Engine.check, naming the prompt; before any begins.
    """
    requests = [Request(str(index), prompt, sampling, n, adapter=adapter) for index, prompt in enumerate(prompts)]
    engine.about.check_all(requests)
    for request in requests:
        engine.add(request)
    while engine.busy:
        for output in engine.step():
            yield int(output.id), output
