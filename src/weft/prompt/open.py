"""The model that a command line names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.prompt.model import Model


@contextmanager
def open_model(
    path: Path | None, url: str = "", name: str = "", key: str = "", at_once: int = 16, device: str = "auto",
    dtype: str = "auto",
) -> Iterator[Model]:  # fmt: skip
    """A checkpoint in this process, or a model behind a server.

    Raises:
        ValueError: both are named or none is, or it cannot be reached.
    """
    if (path is None) == (not url):
        raise ValueError("which model? Name a checkpoint, or a server with --url http://HOST:PORT/v1; one of the two")
    model: Model
    if url:
        from weft.prompt.remote import RemoteModel

        model = RemoteModel(url, name, key, at_once)
    else:
        from weft.prompt.local import LocalModel

        assert path is not None
        model = LocalModel(path, device, dtype)
    try:
        yield model
    finally:
        model.close()
