"""Retention: which checkpoints are kept, and what has to hold before one goes. Torch-free."""

from __future__ import annotations

from pathlib import Path

from weft.checkpoint.folder import checkpoints, discard, step_of
from weft.checkpoint.inspection import glance
from weft.checkpoint.manifest import DamageError


def retain(folder: Path, keep: int, saved: Path) -> list[Path]:
    """Remove what is older than the newest `keep` whole checkpoints, and return it.

    `saved` is the one just written. Unless it is whole, nothing is removed; it is never removed itself, and damaged
    ones count for nothing: so the last good one always stays.

    Raises:
        DamageError: `saved` is not whole.
    """
    damage = glance(saved)
    if damage:
        raise DamageError(f"{saved} was just written and is not whole, so no older one was removed: {damage[0]}")
    whole = [path for path in checkpoints(folder) if not glance(path)]
    kept = {*whole[:keep], saved}
    oldest = min(step_of(path) or 0 for path in kept)
    removed = [path for path in checkpoints(folder) if (step_of(path) or 0) < oldest]
    for path in removed:
        discard(path)
    return removed
