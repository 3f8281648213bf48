"""Folders that a user has named. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make it, and those that it lies in, where they are missing.

    Raises:
        ValueError: a file is in the way, no folder can be there at all, or this user may not write in it.
        OSError: the disk takes nothing.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be made a folder ({error.strerror}): name another place") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path} may not be written by you, or at all: name another place")
