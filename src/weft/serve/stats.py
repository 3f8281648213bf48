"""What an engine is doing, in numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.serve.requests.request import Finish


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since it began.

    Attributes:
        running, waiting: completions now.
        cache_tokens: tokens that the cache has room for.
        block_tokens: of one of its blocks.
        cache_used: the share of its blocks that running sequences hold, 0 to 1.
        steps: steps in which something was computed.
        prompt_tokens, cached_tokens: of the prompts begun, and how many of them were found in the cache.
        new_tokens: given out.
        preemptions: sequences whose blocks were taken, to be computed again.
        drafted, accepted: tokens that speculation proposed, and those that the model would have chosen.
        finished: completions by why they ended.
        adapters: those that run and those that wait now, by adapter.
    """

    running: int
    waiting: int
    cache_tokens: int
    block_tokens: int
    cache_used: float
    steps: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    finished: dict[Finish, int]
    adapters: dict[str, tuple[int, int]] = field(default_factory=dict)
