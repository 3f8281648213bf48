"""Train, valid and test: contiguous ranges of documents, by fractions."""

import math
from typing import Literal, get_args

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
Split = tuple[float, float, float]


def parse(text: str) -> Split:
    """`969,30,1`, `0.9,0.1,0` or `1` (the rest is 0), normalised to a sum of 1.

    Raises:
        ValueError: not one to three numbers, a negative one, or all zero.
    """
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"split {text!r} is not a list of numbers such as 969,30,1") from None
    if len(numbers) > 3:
        raise ValueError(f"split {text!r} has {len(numbers)} numbers; it has three: train,valid,test")
    return normalise((*numbers, *[0.0] * (3 - len(numbers))))


def normalise(split: tuple[float, ...]) -> Split:
    """The three fractions, scaled to a sum of 1."""
    good = len(split) == 3 and all(math.isfinite(x) and x >= 0 for x in split) and sum(split) > 0
    if not good:
        raise ValueError(f"split {split} must be three numbers, train,valid,test, none negative and not all zero")
    train, valid, test = (float(x) / sum(split) for x in split)
    return train, valid, test


def bounds(num_documents: int, split: tuple[float, ...], part: str) -> tuple[int, int]:
    """First and last+1 document of a part. The parts of a split never overlap and leave nothing out.

    Raises:
        ValueError: the split or the part is not one.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is none of {', '.join(PARTS)}")
    fractions = normalise(split)
    at = PARTS.index(part)
    edges = [round(sum(fractions[:k]) * num_documents) for k in range(3)] + [num_documents]
    return edges[at], edges[at + 1]
