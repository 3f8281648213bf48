"""Outlet: where a run prints, which may go away while it trains."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO

GONE = {errno.EPIPE, errno.EIO, errno.EBADF}
"""Nobody reads the pipe any more; the terminal is closed. A full disk may have room again."""


class Outlet:
    """A stream, except that training does not end because nobody takes what it prints: that is left out."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno in GONE:  # at the end the interpreter would still try to write what is left
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), self.stream.fileno())
        return len(text)

    def flush(self) -> None:
        """Done with each text."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
