"""Reading a step's logits: what they say of the prompts' tokens, and which tokens come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from weft.serve.requests.request import TokenLogprob
from weft.serve.schedule.scheduler import Work
from weft.serve.steps.sampler import choose, logprobs_of


@dataclass(frozen=True)
class Found:
    """What a work's logits said: a token for each place that one may follow (None: they were no numbers), and its
    log-probability where asked for."""

    chosen: list[int | None]
    logprobs: list[TokenLogprob]


def read(logits: Tensor, rows: Sequence[tuple[Work, int]], found: dict[int, Found]) -> None:
    """Logits [W, V] of these places of sequences: log-probabilities of the prompts' tokens, and choices of new ones."""
    prompts = [row for row, (work, at) in enumerate(rows) if is_asked(work, at)]
    if prompts:
        asked = [rows[row][0].sequence for row in prompts]
        tokens = [rows[row][0].sequence.tokens[rows[row][1] + 1] for row in prompts]
        counts = [sequence.request.prompt_logprobs or 0 for sequence in asked]
        for sequence, logprob in zip(asked, logprobs_of(logits[prompts], tokens, counts), strict=True):
            sequence.prompt_logprobs.append(logprob)
    new = [row for row, (work, at) in enumerate(rows) if at >= len(work.sequence.tokens) - 1]
    if not new:
        return
    logits = logits if len(new) == len(rows) else logits[new]
    works = [rows[row][0] for row in new]
    sequences = [work.sequence for work in works]
    texts = [
        one.tokens + one.draft[:ahead] if (ahead := rows[row][1] - len(one.tokens) + 1) else one.tokens
        for row, one in zip(new, sequences, strict=True)
    ]
    chosen = choose(logits, sequences, texts)
    # what is no number anywhere is none everywhere: a column tells
    numbers = logits[:, 0].isfinite().tolist()
    wanted = [sequence.request.logprobs for sequence in sequences]
    logprobs: list[TokenLogprob] = []
    if any(count is not None for count in wanted):
        logprobs = logprobs_of(logits, chosen, [count or 0 for count in wanted])
    for row, work in enumerate(works):
        found[id(work)].chosen.append(chosen[row] if numbers[row] else None)
        if wanted[row] is not None:
            found[id(work)].logprobs.append(logprobs[row])


def is_asked(work: Work, at: int) -> bool:
    """Whether the logits of this place are of a prompt's token whose log-probability is asked for, and not there yet."""
    sequence = work.sequence
    return sequence.wants_prompt and len(sequence.prompt_logprobs) <= at + 1 < len(sequence.request.prompt)
