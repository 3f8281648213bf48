"""A step's work, computed: what each sequence goes on with, whichever way is the fastest that may be taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from weft.serve.schedule.scheduler import Scheduler, Work
from weft.serve.steps.ahead import Ahead
from weft.serve.steps.batch import Batch
from weft.serve.steps.reading import Found, read
from weft.serve.steps.runner import Runner
from weft.serve.steps.speculate import Drafter


class Computing:
    """
    Args:
        drafter: who speculates; None: nobody.

    Attributes:
        passes: of the last works, how often the model computed, one pass after the other.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, drafter: Drafter | None) -> None:
        self.runner, self.scheduler, self.drafter = runner, scheduler, drafter
        self.ahead = Ahead(runner, scheduler)
        self.passes = 1

    def begin(self) -> None:
        """Before a step is scheduled: give drafts to those who wait for their next token, no longer than their room."""
        if self.drafter is None:
            return self.ahead.begin()
        for completion in self.scheduler.running:
            count = min(self.scheduler.config.draft_tokens, completion.room - len(completion.tokens) - 1)
            if completion.waiting == 1 and count > 0 and completion.begun and completion.request.grammar is None:
                self.drafter.begin(completion, count)
        return None

    def __call__(self, works: list[Work]) -> dict[int, Found]:
        """Of each work, by its id."""
        if self.ahead.takes(works):
            self.passes = max(work.stop - work.start for work in works)
            return self.ahead.run(works)
        self.passes = 1
        found = {id(work): Found([], []) for work in works}
        rows = iter([(work, at) for work in works for at in wanted(work)])
        for logits in self._run(works):
            read(logits, list(islice(rows, len(logits))), found)
        return found

    def _run(self, works: list[Work]) -> Iterator[Tensor]:
        if self.drafter is not None:
            self.drafter.guess(works)
        for together in [[work] for work in works] if self.scheduler.config.invariant else [works]:
            size = self.scheduler.blocks.size
            batch = Batch.of(together, size, [work.sequence.wants_prompt for work in together])
            if self.drafter is not None:
                self.drafter.follow(batch)
            yield from self.runner.run(batch)


def wanted(work: Work) -> range:
    """Places of a sequence whose logits its work gives, as in `Batch.of`."""
    return range(work.start if work.sequence.wants_prompt else len(work.sequence.tokens) - 1, work.stop)
