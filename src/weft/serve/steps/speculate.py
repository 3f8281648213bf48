"""Speculation: tokens that may come next, guessed cheaply, and checked by the model all at once (Leviathan et al., 2023).

A guess is kept where the model, asked at that place with that place's own random number, chooses the same token. So a
text is what it would be without speculation, sampled ones too; only the number of steps is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from weft.models.decoder import Decoder
from weft.serve.config import EngineConfig
from weft.serve.requests.sequence import Sequence as Completion
from weft.serve.schedule.scheduler import Work
from weft.serve.steps.batch import Batch
from weft.serve.steps.runner import Runner
from weft.serve.steps.sampler import highest

GRAM = 3
"""Tokens that must have stood together before, for what followed them to be guessed again."""


class Drafter(Protocol):
    """Where guesses come from."""

    def begin(self, completion: Completion, count: int) -> None:
        """Before a step is scheduled: give this completion a draft of at most `count` tokens, or as many places."""

    def guess(self, works: Sequence[Work]) -> None:
        """When it is: fill the places that were left open."""

    def follow(self, batch: Batch) -> None:
        """Before the model computes a batch."""


class LookupDrafter:
    """What followed the last few tokens when they stood in this text before (Saxena, prompt lookup decoding, 2023)."""

    def begin(self, completion: Completion, count: int) -> None:
        tokens, seen = completion.tokens, completion.grams
        for end in range(seen.setdefault((), GRAM), len(tokens)):  # () counts how far the text is read
            seen[tuple(tokens[end - GRAM : end])] = end
        seen[()] = max(GRAM, len(tokens))
        at = seen.get(tuple(tokens[-GRAM:])) if len(tokens) > GRAM else None
        completion.draft = [] if at is None else tokens[at : at + count]

    def guess(self, works: Sequence[Work]) -> None:
        pass

    def follow(self, batch: Batch) -> None:
        pass


class ModelDrafter:
    """The most probable tokens by a smaller model of the same vocabulary.

    Its cache has the same blocks as the large one's, in the same tables: it computes every batch too, and so has its own
    keys and values of whatever the large model has, shared prefixes too.
    """

    def __init__(self, model: Decoder, num_blocks: int, config: EngineConfig) -> None:
        self.runner, self.block = Runner(model, num_blocks, replace(config, adapters={})), config.block_tokens

    def begin(self, completion: Completion, count: int) -> None:
        completion.draft = [0] * count

    def guess(self, works: Sequence[Work]) -> None:
        going = [work for work in works if work.stop > len(work.sequence.tokens)]
        for number in range(max((work.stop - len(work.sequence.tokens) for work in going), default=0)):
            going = [work for work in going if work.stop > len(work.sequence.tokens) + number]
            ends = [len(work.sequence.tokens) + number for work in going]
            steps = [Work(work.sequence, end - 1, end) for work, end in zip(going, ends, strict=True)]
            pieces = self.runner.run(Batch.of(steps, self.block, [True] * len(steps)))
            ids = [token for logits in pieces for token in highest(logits).tolist()]
            for work, token in zip(going, ids, strict=True):
                work.sequence.draft[number] = token

    def follow(self, batch: Batch) -> None:
        for _ in self.runner.run(batch.without_logits()):
            pass


def window(model: Decoder, draft: Decoder | None) -> int | None:
    """Tokens that any layer of either model sees; None: all. A model whose layers differ is not loaded at all."""
    sizes = [one.shape.sliding_window for one in (model, draft) if one is not None]
    return None if None in sizes else max(size for size in sizes if size is not None)


def make_drafter(model: Decoder, draft: Decoder | None, config: EngineConfig, blocks: int) -> Drafter | None:
    config.check_draft(draft)
    if not config.draft_tokens:
        return None
    if draft is None:
        return LookupDrafter()
    if draft.shape.vocab != model.shape.vocab:
        raise ValueError(
            f"the draft model's vocabulary is {draft.shape.vocab}, the model's {model.shape.vocab}: "
            "they must have the same tokenizer"
        )
    return ModelDrafter(draft, blocks, config)
