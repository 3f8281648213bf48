"""Whether newer weights may take the place of the present ones: both read the same text, and their losses are compared."""

from __future__ import annotations

import math
import secrets
from contextlib import aclosing
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from weft.serve.requests.request import Request, Sampling

if TYPE_CHECKING:
    from weft.serve.server.version import Version

LAST = 2**31 - 1
"""Priority of what the gate asks: everybody goes before it."""

MOST = 4096
"""Tokens that are compared, of a longer text the first ones."""

TEXT = """\
A loom holds the warp, the threads that run its whole length, under tension. The weft is the thread that crosses them, over
one and under the next, row after row, until what were single threads is cloth. How close the rows lie decides how strong
the cloth is, and a fault in one row runs on through all that follow, unless somebody looks.

In 1804 a weaver of Lyon had his loom read the pattern from punched cards: one card for each row, one hole for each
thread that is lifted. Whoever wanted another pattern changed the cards, not the loom. Engines that calculate took that up.

def fibonacci(count):
    first, second = 0, 1
    numbers = []
    for _ in range(count):
        numbers.append(first)
        first, second = second, first + second
    return numbers

Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it boils at about 90. 7 times 8 is 56. The
capital of France is Paris, and that of Japan is Tokyo. If all cats are animals and Tom is a cat, then Tom is an animal.
"""


@dataclass(frozen=True)
class Verdict:
    """Losses are in nats per token.

    Attributes:
        present, newer: mean loss of the weights that are served, and of those that would be.
        worse: by how much the newer ones' loss may be higher, with 95 % confidence: mean of the differences, token by
            token, and 1.645 of its standard errors.
        tokens: that were compared.
    """

    present: float
    newer: float
    worse: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"loss {self.present:.4f} → {self.newer:.4f} over {self.tokens} tokens, worse by {self.worse:.4f} at most"
        )


async def compare(present: Version, newer: Version, text: str | None = None) -> Verdict:
    """
    Args:
        text: that is read; None: TEXT. A model without a tokenizer reads its token ids, one after the other.

    Raises:
        ValueError: the two have not the same vocabulary, or the newer one's logits are no numbers.
    """
    if present.shape.vocab != newer.shape.vocab or table(present) != table(newer):
        raise ValueError(
            f"{newer.folder} has another tokenizer than what is served: its losses cannot be compared; serve it under "
            "a name of its own"
        )
    if present.words is None:
        ids = [token % present.shape.vocab for token in range(512)]
    else:
        ids = present.words.tokenizer.encode(text or TEXT).ids[:MOST]
    if len(ids) < 3:
        raise ValueError("the gate's text has fewer than 3 tokens: give a longer one")
    context = min(present.max_context, newer.max_context) - 1
    old, new = [await losses(version, ids, context) for version in (present, newer)]
    apart = [after - before for before, after in zip(old, new, strict=True)]
    worse = fmean(apart) + 1.645 * stdev(apart) / math.sqrt(len(apart))
    return Verdict(fmean(old), fmean(new), worse, len(apart))


def table(version: Version) -> str:
    return version.words.tokenizer.to_str() if version.words is not None else ""


async def losses(version: Version, ids: list[int], context: int) -> list[float]:
    """Of each token but the first of every stretch of `context`.

    Raises:
        ValueError: the model's logits are no numbers.
    """
    found = []
    for start in range(0, len(ids), context):
        stretch = ids[start : start + context]
        if len(stretch) < 2:
            break
        sampling = Sampling(max_tokens=1)
        request = Request(f"gate-{secrets.token_hex(8)}", stretch, sampling, priority=LAST, prompt_logprobs=0)
        async with aclosing(version.desk.stream(request)) as outputs:
            async for output in outputs:
                if output.finish == "error":
                    raise ValueError(f"{version.folder}: {output.error}")
                found += [-one.logprob for one in output.prompt_logprobs or () if one is not None]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{version.folder}: a loss is not a finite number")
    return found
