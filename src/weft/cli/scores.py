"""How commands tell what a model scored: tables in the terminal, JSON in files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli.output import check_access

if TYPE_CHECKING:
    from rich.console import Console

    from weft.prompt.file import Prompt, Row
    from weft.prompt.score import Answer


def wide(console: Console) -> Console:
    """Tables keep their lines whole where they go into a file."""
    from rich.console import Console

    return console if console.is_terminal else Console(width=160)


def make_room(out: Path | None) -> None:
    """See to it that a file can be written, before anything is asked for it.

    Raises:
        ValueError: it cannot.
    """
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: {error.filename}") from None
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    check_access("--out", out)


def write_json(path: Path, tree: object) -> None:
    from weft.whole import write_whole

    write_whole(path, json.dumps(known(tree), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"written: {path}")


def write_answers(out: Path, asked: Prompt, rows: list[Row], came: dict[int, Answer]) -> None:
    """Rows and the answers that came to them, as JSON lines, in the rows' order."""
    lines = [
        rows[at] | {"prompt": asked.id, "answer": came[at].answer, "texts": came[at].reply.texts} for at in sorted(came)
    ]
    out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    if len(came) < len(rows):
        print(f"weft: {len(came)} of {len(rows)} rows were answered; they are in {out}", file=sys.stderr)


def known(tree: Any) -> Any:
    """The same with null for what is no number, as the error of a single value: JSON has no NaN."""
    if isinstance(tree, dict):
        return {name: known(one) for name, one in tree.items()}
    if isinstance(tree, list | tuple):
        return [known(one) for one in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
