"""Several tokens of each sequence in one step, where a step is short and what the CPU does between two is not: on a GPU.

The device chooses a token and goes on from it, and the CPU hears of all of them at the end. To the scheduler they are a
draft whose places are open, as a draft model's are; here the model itself fills them, so none is ever wrong. What a
sequence computed behind its end is dropped, as drafts are. It is done while nobody waits, and where nothing that the CPU
knows has a say in the choice: no penalties, forms, or log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weft.serve.requests.sequence import Sequence as Completion
from weft.serve.schedule.scheduler import Scheduler, Work
from weft.serve.steps.batch import Batch
from weft.serve.steps.reading import Found
from weft.serve.steps.runner import Runner
from weft.serve.steps.sampler import pick

TOKENS = 4
"""Of each sequence; a request that comes meanwhile waits for them."""


class Ahead:
    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.allowed = runner.ranks is None and not scheduler.config.invariant and not scheduler.config.draft_tokens

    def begin(self) -> None:
        """Before a step is scheduled: open the places, where all that runs can have them."""
        scheduler, running = self.scheduler, self.scheduler.running
        if not self.allowed or self.runner.decoding is None or scheduler.waiting or not running:
            return
        if not all(one.waiting == 1 and is_plain(one) for one in running):
            return
        if scheduler.blocks.num_free < len(running):  # a draft is not worth another one's blocks
            return
        count = min(TOKENS, scheduler.config.block_tokens, scheduler.config.step_tokens // len(running))
        for one in running:
            one.draft = [0] * max(0, min(count, one.room - len(one.tokens)) - 1)

    def takes(self, works: list[Work]) -> bool:
        """Whether a step is to be done so: it has places to fill. Beside a prompt, they are closed again."""
        if not self.allowed or not any(work.sequence.draft for work in works):
            return False
        if all(work.start == len(work.sequence.tokens) - 1 for work in works):
            return True
        for place, work in enumerate(works):
            works[place] = replace(work, stop=min(work.stop, len(work.sequence.tokens)))
            work.sequence.draft = []
        return False

    def run(self, works: Sequence[Work]) -> dict[int, Found]:
        """What each work's sequence goes on with, by the work's id; its draft is that, but for the last."""
        sequences = [work.sequence for work in works]
        first = [Work(work.sequence, work.start, work.start + 1) for work in works]
        batch = Batch.of(first, self.scheduler.blocks.size, [False] * len(works))
        batch = replace(batch, tables=[sequence.blocks for sequence in sequences])
        finite: list[Tensor] = []

        def choose(logits: Tensor, step: int) -> Tensor:
            finite.append(logits[:, 0].isfinite())
            return pick(logits, sequences, [sequence.num_new + step for sequence in sequences])

        chosen = self.runner.several(batch, [work.stop - 1 for work in works], choose)
        ids, numbers = torch.stack((torch.stack(chosen, dim=1), torch.stack(finite, dim=1))).tolist()
        found: dict[int, Found] = {}
        for work, tokens, fine in zip(works, ids, numbers, strict=True):
            count = work.stop - work.start
            found[id(work)] = Found(
                [t if yes else None for t, yes in zip(tokens[:count], fine[:count], strict=True)], []
            )
            work.sequence.draft = tokens[: count - 1]
        return found


def is_plain(completion: Completion) -> bool:
    """Whether its next tokens follow from the logits and its random numbers alone, and nothing else is told of them."""
    request, sampling = completion.request, completion.request.sampling
    if not completion.begun or completion.num_new < sampling.min_tokens or completion.adapter:
        return False
    return request.logprobs is None and not (sampling.bias or sampling.penalizes or completion.matcher)
