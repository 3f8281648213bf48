"""Prompts side by side on the same labelled rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.prompt.file import Prompt, Row
from weft.prompt.model import Model
from weft.prompt.score import Progress, Scored, check, quiet, score
from weft.prompt.statistics import paired_bootstrap


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in any currency; 0: not known."""

    prompt: float = 0.0
    new: float = 0.0

    def of(self, scored: Scored) -> float:
        return (scored.prompt_tokens * self.prompt + scored.new_tokens * self.new) / 1e6


def compare(prompts: Sequence[Prompt], rows: Sequence[Row], model: Model, progress: Progress = quiet) -> list[Scored]:
    """Each prompt's answers to the same rows.

    Raises:
        ValueError: two prompts are the same, or one cannot be put to these rows.
    """
    ids = [prompt.id for prompt in prompts]
    if twice := {one for one in ids if ids.count(one) > 1}:
        raise ValueError(f"the prompt {min(twice)} stands twice: there is nothing to compare")
    for prompt in prompts:
        check(prompt, rows)
    return [score(prompt, rows, model, progress) for prompt in prompts]


def against(first: Scored, other: Scored) -> tuple[float, float, float]:
    """How much more accurate the other is on the same rows, with its 95 % interval."""
    return paired_bootstrap(first.right, other.right)


def record(scored: Sequence[Scored], rows: Sequence[Row], model: Model, price: Price) -> dict[str, Any]:
    """All that was asked, answered and scored, for a JSON file: enough to score it again without asking."""
    data = hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()
    return {
        "model": model.name,
        "data": data,
        "rows": len(rows),
        "prompts": [_one(it, scored[0], price) for it in scored],
    }


def _one(scored: Scored, first: Scored, price: Price) -> dict[str, Any]:
    difference, low, high = against(first, scored)
    return {
        "prompt": scored.prompt.id, "digest": scored.prompt.digest, "accuracy": scored.accuracy,
        "interval": scored.interval, "difference": difference, "difference_interval": [low, high],
        "prompt_tokens": scored.prompt_tokens, "new_tokens": scored.new_tokens, "seconds": scored.seconds,
        "price": price.of(scored) if price != Price() else None,
        "answers": [
            {"answer": it.answer, "label": label, "right": right, "texts": it.reply.texts, "cut": it.reply.cut}
            for it, label, right in zip(scored.answers, scored.labels, scored.right, strict=True)
        ],
    }  # fmt: skip
