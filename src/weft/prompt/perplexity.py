"""How well a model foresees a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.config.load import read_text
from weft.prompt.model import Model
from weft.prompt.score import Progress, quiet
from weft.prompt.statistics import ratio_error


@dataclass(frozen=True)
class Perplexity:
    """
    Attributes:
        tokens: that were foreseen: all but the first.
        nats: mean of -log p of a token.
        error: standard error of `nats`, over windows: tokens near each other are not foreseen independently.
        bits_per_byte: what does not depend on the tokenizer; nan for a text of which only tokens are known.
        window, stride: tokens that are read at once, and by how many the next window lies farther.
    """

    text: str
    tokens: int
    nats: float
    error: float
    bits_per_byte: float
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.error


def perplexity(
    name: str, ids: Sequence[int], num_bytes: int, model: Model, window: int | None = None, stride: int | None = None,
    progress: Progress = quiet,
) -> Perplexity:  # fmt: skip
    """
    Args:
        ids: the text's tokens.
        num_bytes: of the text; 0: not known.
        window: None: as many as the model takes.
        stride: None: windows stand side by side. Less: they overlap, and each token but the first window's has at least
            window - stride tokens before it; as many times dearer.

    Raises:
        ValueError: the text has fewer than two tokens, or window and stride do not fit the model or each other.
    """
    if len(ids) < 2:
        raise ValueError(f"{name} has {len(ids)} tokens; nothing stands before the first, so two are needed")
    longest = model.longest
    window = window or min(longest, len(ids))
    if not 2 <= window <= longest:
        raise ValueError(f"--window {window}: it must be from 2 to {longest}, what the model takes")
    stride = stride or window - 1
    if not 1 <= stride < window:
        raise ValueError(
            f"--stride {stride}: it must be from 1 to {window - 1}: each window begins with a token of the last"
        )
    cuts = windows(len(ids), window, stride)
    sums, counts = [0.0] * len(cuts), [stop - fresh for _, fresh, stop in cuts]
    for done, (index, logprobs) in enumerate(model.logprobs([ids[start:stop] for start, _, stop in cuts]), start=1):
        sums[index] = -sum(logprobs[len(logprobs) - counts[index] :])
        progress(name, done, len(cuts))
    nats, error = ratio_error(sums, counts)
    bits = sum(sums) / math.log(2) / num_bytes if num_bytes else math.nan
    return Perplexity(name, sum(counts), nats, error, bits, window, stride)


def windows(count: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first token that counts, stop) of each window: every token but the first counts once."""
    cuts = [(0, 1, min(window, count))]
    while cuts[-1][2] < count:
        fresh = cuts[-1][2]
        stop = min(fresh + stride, count)
        cuts.append((max(0, fresh + stride - window), fresh, stop))
    return cuts


def find_text(path: Path) -> str | None:
    """A file's text; None: the path is the prefix of token files (`weft data prepare`).

    Raises:
        ValueError: there is neither, or the text is not UTF-8.
    """
    if path.is_file():
        return read_text(path)
    if not Path(f"{path}.bin").is_file():
        raise ValueError(f"there is no text file {path}, nor token files {path}.bin and {path}.idx")
    return None


def read_tokens(path: Path, model: Model, limit: int | None = None) -> tuple[str, list[int], int]:
    """A text's name, tokens and bytes; the last is 0 where it is not known.

    Raises:
        ValueError: as `find_text`.
    """
    text = find_text(path)
    if text is not None:
        ids = model.encode(text)
        return str(path), ids[:limit], len(text.encode()) if limit is None or limit >= len(ids) else 0
    from weft.data.indexed import IndexedDataset

    return str(path), [int(one) for one in IndexedDataset(path).tokens[:limit]], 0
