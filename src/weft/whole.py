"""Files that are there whole or not at all. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside `path`, then take its name: who reads it, or dies meanwhile, leaves or finds the old text or the new.

    A link stays one, to the new text. A pipe or a device (/dev/stdout, /dev/null) is written to, and stays there.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    beside = path.with_name(f"{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
