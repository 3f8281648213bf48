"""A folder for one process at a time. Torch-free."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from weft.folder import make_folder


@contextlib.contextmanager
def alone(folder: Path, busy: str) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, until the block ends or the process does.

    Raises:
        ValueError: another process holds it; the message is `busy`. Or it cannot be made.
    """
    make_folder(folder)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        yield
