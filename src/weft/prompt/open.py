"""The model that a command line names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.prompt.journal import Journal
from weft.prompt.model import Model


@contextmanager
def open_model(
    path: Path | None, url: str = "", name: str = "", key: str = "", at_once: int = 16, device: str = "auto",
    dtype: str = "auto", out: Path | None = None, sure: bool = False,
) -> Iterator[Model]:  # fmt: skip
    """A checkpoint in this process, or a model behind a server.

    Args:
        out: the file that all this is for. Until the block ends well, answers are kept beside it (`….part`), and the next
            command of the same `out` takes them over.
        sure: a server is asked at once whether it has the model that is named: for those who wait for somebody to type.

    Raises:
        ValueError: both are named or none is, or it cannot be reached.
    """
    if (path is None) == (not url):
        raise ValueError("which model? Name a checkpoint, or a server with --url http://HOST:PORT/v1; one of the two")
    if path is not None and name:
        raise ValueError(f"--model {name} is one of a server's models, and no --url names a server")
    model: Model
    if url:
        from weft.prompt.remote import RemoteModel

        model = RemoteModel(url, name, key, at_once, sure=sure)
        who = [url, model.name]
    else:
        from weft.serve.folder import find_model

        assert path is not None
        find_model(path)  # before torch is imported, which takes a while
        from weft.prompt.local import LocalModel

        model = LocalModel(path, device, dtype)
        who = [str(model.folder.resolve()), dtype]
    try:
        if out is None:
            yield model
        else:
            with kept(Journal(model, out.with_name(f"{out.name}.part"), who)) as journal:
                yield journal
    finally:
        model.close()


@contextmanager
def kept(journal: Journal) -> Iterator[Journal]:
    """Says what is there, how much was taken over, and, unless the block ends well and the file goes, what is kept."""
    if journal.held:
        print(f"weft: {journal.path} has {journal.held} answers from before", file=sys.stderr)
    try:
        yield journal
    except BaseException:
        if not journal.held:
            journal.path.unlink(missing_ok=True)
        else:
            print(
                f"weft: {journal.held} answers are kept in {journal.path}: the same command goes on from there",
                file=sys.stderr,
            )
        raise
    if journal.taken:
        print(f"weft: {journal.taken} answers were taken over from {journal.path}", file=sys.stderr)
    journal.path.unlink(missing_ok=True)
