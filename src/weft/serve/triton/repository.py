"""What a folder of models for Triton holds, read before anything is started. Torch-free."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from weft.serve.triton.settings import read_settings

CONFIG, CODE, PACKAGE = "config.pbtxt", "model.py", "model.pt2"
IMPORT = "from weft.serve.triton.model import TritonPythonModel"
"""What makes a Python model one of weft's."""

AOTI = re.compile(r'^\s*platform\s*:\s*"torch_aoti"\s*$', re.MULTILINE)

LOADED = "WEFT_TRITON_LOADED"
"""An environment variable: the folder in which a model of weft's makes a file of its name when it is loaded."""


@dataclass(frozen=True)
class Model:
    """
    Attributes:
        backend: as its config names it.
        ours: whether weft's engine answers, so that it can be asked.
    """

    name: str
    backend: str
    ours: bool


def read_repository(folder: Path) -> list[Model]:
    """The models of a repository.

    Raises:
        ValueError: there is none, or one of weft's has settings that cannot be.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: make a repository with weft export triton")
    configs = sorted(folder.glob(f"*/{CONFIG}"))
    if not configs:
        raise ValueError(f"{folder} is no repository of Triton's: no folder in it has a {CONFIG}")
    return [_read_model(config) for config in configs]


def say_loaded(model: str) -> None:
    """Of a model of weft's, from inside of Triton."""
    if folder := os.environ.get(LOADED):
        (Path(folder) / model).touch()


def without_aoti(repository: Path, empty: Path) -> Path:
    """The repository for a Triton that refuses every config with a platform `torch_aoti`, as it does not know it: links in
    an empty folder, and such configs without the name. Itself, where there are none."""
    configs = {config.parent: config.read_text(encoding="utf-8") for config in repository.glob(f"*/{CONFIG}")}
    named = {folder: text for folder, text in configs.items() if AOTI.search(text)}
    if not named:
        return repository
    for path in repository.iterdir():
        if path not in named:
            (empty / path.name).symlink_to(path)
            continue
        (empty / path.name).mkdir()
        for one in path.iterdir():
            if one.name != CONFIG:
                (empty / path.name / one.name).symlink_to(one)
        (empty / path.name / CONFIG).write_text(AOTI.sub("", named[path]), encoding="utf-8")
    return empty


def in_ascii(repository: Path, link: Path) -> Path:
    """The repository by a path that Triton's stub can open, whose Python knows ASCII alone: itself, or a link to it."""
    if str(repository).isascii():
        return repository
    link.symlink_to(repository)
    return link


def _read_model(config: Path) -> Model:
    found = re.search(r'^\s*(?:backend|platform)\s*:\s*"(\w+)"', config.read_text(encoding="utf-8"), re.MULTILINE)
    versions = [path for path in config.parent.iterdir() if path.name.isdigit() and path.is_dir()]
    ours = [path for path in versions if (path / CODE).is_file() and IMPORT in (path / CODE).read_text("utf-8")]
    for version in ours:
        weights, _ = read_settings(version)
        if not weights.is_dir():
            raise ValueError(f"{weights} is not there: export the model again, or correct weights in model.json")
    return Model(config.parent.name, found[1] if found else "", bool(ours))
