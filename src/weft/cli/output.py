"""Files and folders that a command is to write: looked at before the work, which they would otherwise cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from weft.folder import make_folder


def writable(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of an option. Raises: ValueError: nothing can be written there; names the option."""
    if value is None:
        return None
    if value.is_dir():
        raise ValueError(f"{parameter.opts[0]} {value} is a folder: name a file in it")
    if not value.parent.is_dir():
        raise ValueError(f"{parameter.opts[0]} {value}: there is no folder {value.parent}: make it first")
    check_access(parameter.opts[0], value)
    return value


def vacant(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of an option: the folder, made and empty. Raises: ValueError: it cannot be; names the option."""
    if value is None:
        return None
    make_folder(value)
    if any(value.iterdir()):
        raise ValueError(f"{parameter.opts[0]} {value} is not empty: name a new folder")
    return value


def check_access(option: str, file: Path) -> None:
    """
    Raises:
        ValueError: this user may not write the file.
    """
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{option} {file} may not be written by you, or at all: name another place")


Html = Annotated[
    Path | None, typer.Option(help="Also: all of it, drawn, as one page into this file.", callback=writable)
]
