"""Recompute: which activations are computed again in backward, and in which blocks. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

OPERATIONS = ("matmul", "attention", "network")
"""Whose results may be kept: matrix products, attention, and what came over the network."""
MODULES = ("attention", "mlp", "experts")
"""Parts of a block that may be computed again alone: attention and the MLP each with the norm before it, or of a mixture
only what experts do with tokens that were dealt out to them, so that nothing is sent a second time."""
FORMS = (
    "none, full (whole blocks), selective (all but matmul+attention+network), keep-attention+network (all but these), "
    "redo-mlp, redo-attention+experts (these parts alone), fit40g (so many full blocks that 40 GiB suffice); "
    "full/2 in every second block, full:12 in the first 12 of a stage"
)


@dataclass(frozen=True)
class Recompute:
    """What `layout.recompute` says.

    Attributes:
        keeps: operations whose results a block keeps; all else in it is computed again. Empty: it keeps its input alone.
        redone: parts of a block of which their input alone is kept; empty: the block as a whole is meant.
        every: one of so many blocks, the first of a stage among them.
        first: so many blocks of a stage; None: no such bound.
        budget: bytes of memory that as many full blocks as needed are recomputed for; None: none.
    """

    keeps: tuple[str, ...] = ()
    redone: tuple[str, ...] = ()
    every: int = 1
    first: int | None = None
    budget: int | None = None

    @classmethod
    def parse(cls, text: str) -> Recompute:
        """Raises: ValueError: `text` is none of FORMS."""
        if text == "none":
            return cls(first=0)
        if match := re.fullmatch(r"fit([1-9]\d*)([gm])", text):
            return cls(budget=int(match[1]) << (30 if match[2] == "g" else 20))
        pattern = r"(?:(full)|(selective)|keep-([a-z+]+)|redo-([a-z+]+))(?:/([2-9]|[1-9]\d+)|:([1-9]\d*))?"
        if not (match := re.fullmatch(pattern, text)):
            raise ValueError(f"layout.recompute = {text!r} is not understood. Forms: {FORMS}")
        _, selective, keeps, redone, every, first = match.groups()
        parts = _listed(text, redone, MODULES)
        if {"mlp", "experts"} <= {*parts}:
            raise ValueError(f"layout.recompute = {text!r}: experts are a part of the mlp; name one of the two")
        return cls(
            keeps=OPERATIONS if selective else _listed(text, keeps, OPERATIONS),
            redone=parts,
            every=int(every or 1),
            first=int(first) if first else None,
        )

    def blocks(self, count: int) -> range:
        """Of the `count` blocks of a stage, those that it is done in."""
        assert self.budget is None, "a budget has to be made a number of blocks first: plan/memory/moments.py, settled"
        return range(0, count if self.first is None else min(self.first, count), self.every)


def _listed(text: str, names: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    found = names.split("+") if names else []
    if any(name not in known for name in found) or len(set(found)) < len(found):
        raise ValueError(f"layout.recompute = {text!r}: after the dash stand some of {'+'.join(known)}, each once")
    if found != [name for name in known if name in found]:
        raise ValueError(f"layout.recompute = {text!r}: write them in this order: {'+'.join(known)}")
    return tuple(found)
