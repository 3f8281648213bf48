"""A better prompt within a budget: variants compete on some of the rows, and the winner is measured on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from weft.prompt.candidates import propose, variant, variants
from weft.prompt.compare import against
from weft.prompt.file import Prompt, Row, Shots
from weft.prompt.model import Model
from weft.prompt.render import check_templates
from weft.prompt.score import Progress, Scored, check, quiet, score

FIRST_ROWS = 8
"""Rows that a variant is tried on before it may be given up, at least."""


@dataclass(frozen=True)
class Split:
    """Rows for examples, for choosing, and for the score that is told."""

    pool: list[Row]
    choosing: list[Row]
    held: list[Row]


@dataclass(frozen=True)
class Candidate:
    prompt: Prompt
    right: int
    rows: int

    @property
    def accuracy(self) -> float:
        return self.right / self.rows


@dataclass(frozen=True)
class Search:
    """
    Attributes:
        candidates: all of them, the last that were left first.
        base, best: on the held-out rows; the same object where nothing better was found.
        asked: questions put to the model, each vote counted.
    """

    candidates: list[Candidate]
    base: Scored
    best: Scored
    asked: int

    @property
    def gain(self) -> tuple[float, float, float]:
        """Of the best over the base on the held-out rows, with its 95 % interval."""
        return against(self.base, self.best)


def split(rows: Sequence[Row], shots: Sequence[int], seed: int) -> Split:
    """Shuffled: a quarter for examples where some are wanted, a third of what is left held out.

    Raises:
        ValueError: there are too few.
    """
    order = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    at, held = sizes(len(rows), shots)
    if held < FIRST_ROWS:
        needed = next(many for many in count(len(rows)) if sizes(many, shots)[1] >= FIRST_ROWS)
        raise ValueError(
            f"{len(rows)} rows are too few to choose by and to hold out: this search needs {needed}, examples included"
        )
    return Split(order[:at], order[at + held :], order[at : at + held])


def sizes(rows: int, shots: Sequence[int]) -> tuple[int, int]:
    """How many of the rows are for examples, and how many are held out."""
    most = max(shots, default=0)
    pool = max(rows // 4, most) if most else min(5, rows // 4)
    return pool, (rows - pool) // 3


def search(
    prompt: Prompt, rows: Sequence[Row], model: Model, *, budget: int, instructions: Sequence[str] = (), proposals: int = 0,
    shots: Sequence[int] = (), seed: int = 0, progress: Progress = quiet,
) -> Search:  # fmt: skip
    """Successive halving (Jamieson & Talwalkar, 2016): every variant answers a few rows; the better half stays and answers
    as many again for its share of the budget, until one is left. Only then the held-out rows are asked, once, with it
    and with the prompt that was given.

    Args:
        budget: questions that may be put to the model, the held-out ones among them.
        instructions: to try instead of the prompt's.
        proposals: more of them, that the model writes.
        shots: numbers of examples to try.

    Raises:
        ValueError: the budget or the rows are too few; or an instruction cannot be put to them, which is told before
            anything is asked.
    """
    votes = prompt.output.votes
    parts = split(rows, shots, seed)
    free = budget // votes - 2 * len(parts.held) - math.ceil(proposals / votes)
    if free < 2 * FIRST_ROWS:
        needed = votes * (2 * len(parts.held) + 2 * FIRST_ROWS) + proposals
        raise ValueError(
            f"--budget {budget}: at least {needed} questions are needed to hold two prompts against each other"
        )
    most = most_candidates(free)
    if 1 + len(instructions) + proposals > most:
        raise ValueError(
            f"--budget {budget}: {most} instructions can compete, and there are {1 + len(instructions) + proposals}: "
            "raise it, or try fewer"
        )
    for text in (prompt.instruction, *instructions):
        check(variant(prompt, instruction=text), [*parts.choosing, *parts.held])
    if any(shots):
        check_templates(variant(prompt, examples=tuple(parts.pool), shots=Shots()), parts.held)
    written = propose(prompt, parts.pool, model, proposals, seed) if proposals else []
    tried = variants(prompt, [*instructions, *written], parts.pool, shots, most, seed)
    if len(tried) == 1:
        raise ValueError("there is nothing to try: give instructions (--rewrites, --propose) or numbers of --shots")
    ranking, asked = halve(tried, parts.choosing, model, free, progress)
    base = score(prompt, parts.held, model, progress)
    best = ranking[0].prompt
    final = base if best is prompt else score(best, parts.held, model, progress)
    asked += len(parts.held) * (1 if final is base else 2)
    return Search(ranking, base, final, votes * asked + proposals)


def most_candidates(budget: int) -> int:
    """How many variants can be tried so that each answers FIRST_ROWS rows in the first round."""
    count = 2
    while (count + 1) * FIRST_ROWS * rounds(count + 1) <= budget:
        count += 1
    return count


def rounds(count: int) -> int:
    return max(1, math.ceil(math.log2(count)))


def halve(
    prompts: Sequence[Prompt], rows: Sequence[Row], model: Model, budget: int, progress: Progress = quiet
) -> tuple[list[Candidate], int]:  # fmt: skip
    """The prompts, best first, and the questions that it took. A row is never asked twice with the same prompt."""
    alive = [Candidate(prompt, 0, 0) for prompt in prompts]
    gone: list[Candidate] = []
    asked, total = 0, rounds(len(prompts))
    for number in range(total):
        share = (budget - asked) // (total - number) // len(alive)
        fresh = rows[alive[0].rows : alive[0].rows + share]
        if fresh:
            told = [score(one.prompt, fresh, model) for one in alive]
            asked += len(fresh) * len(alive)
            alive = [
                Candidate(one.prompt, one.right + sum(it.right), one.rows + len(fresh))
                for one, it in zip(alive, told, strict=True)
            ]
        alive.sort(key=lambda one: -one.accuracy)  # stable: of equals, the one nearer to the given prompt
        keep = math.ceil(len(alive) / 2)
        alive, gone = alive[:keep], alive[keep:] + gone
        progress("rounds", number + 1, total)
    return alive + gone, asked
