"""One run after another, each in a folder of its own: what the programs of all systems' users have in common."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist


def take_turns(train: Callable[[Path, Path, Path, Path], None], folders: Sequence[Path]) -> None:
    """`train` with settings, model, tokens and out of each folder; out/failed-RANK says why one failed."""
    for folder in folders:
        print(folder, flush=True)
        try:
            train(folder / "settings", folder / "model", folder / "tokens", folder / "out")
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told, and the next one has its turn)
            traceback.print_exc()
            (folder / f"out/failed-{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
