"""Manifest: what a checkpoint consists of, to the byte. Torch-free.

Small files are bound by their sha256. A tensor file is bound by that of its header and of every region of every tensor
in it, each computed from memory by the process that wrote it: together they cover every byte, nothing is read again to
be hashed, and damage is named with the tensor and the rows it lies in.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.checkpoint.folder import MANIFEST, step_of

FORMAT = 1
"""Of checkpoints that this weft writes."""
OLDEST = 1
"""Format that this weft still reads."""

Digest = Field(pattern=r"^[0-9a-f]{64}$")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RegionRecord(_Record):
    """A box of one tensor, and the sha256 of its numbers in row-major order."""

    tensor: str
    start: list[int]
    stop: list[int]
    sha256: str = Digest

    @property
    def count(self) -> int:
        """Numbers in the box."""
        return prod(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    def __str__(self) -> str:
        box = ", ".join(f"{start}:{stop}" for start, stop in zip(self.start, self.stop, strict=True))
        return f"{self.tensor}[{box}]"


class FileRecord(_Record):
    """One file: its bytes, and either the sha256 of all of it or, for tensors, of its header and its regions."""

    size: int
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    header: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    regions: list[RegionRecord] = []


class Manifest(_Record):
    """Files by their path below the checkpoint's folder, with forward slashes."""

    format: int = FORMAT
    step: int
    layout: str
    files: dict[str, FileRecord]

    def to_json(self) -> bytes:
        """Its text; the last field binds all others."""
        body = self.model_dump(mode="json", exclude_defaults=False)
        return json.dumps(body | {"sha256": _digest(body)}, separators=(",", ":")).encode()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        DamageError: it is missing, unreadable, cut short, edited, or of another step.
        ValueError: it is whole, and in a format that this weft does not read.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise DamageError(f"{file} is missing: the checkpoint was never finished, or lost it later")
    try:
        body = json.loads(file.read_bytes())
    except OSError as error:
        raise DamageError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise DamageError(f"{file} is not a manifest")
    sealed = body.pop("sha256", None)
    if sealed != _digest(body):
        raise DamageError(f"{file} does not match its own sha256: it was edited or damaged")
    check_format(body.get("format"), file)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise DamageError(f"{file} is not a manifest: {error.errors()[0]['msg']}") from error
    named = step_of(path)
    if named is not None and named != manifest.step:
        raise DamageError(f"{file} is of step {manifest.step}: it was copied from another checkpoint than {path.name}")
    for name in manifest.files:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or "\\" in name:
            raise DamageError(f"{file} lists {name!r}, which is outside of the checkpoint")
    return manifest


def check_format(found: Any, file: Path) -> None:
    """Refuse a format that this weft does not read."""
    if not isinstance(found, int):
        raise DamageError(f"{file} names no format")
    if found > FORMAT:
        raise ValueError(
            f"{file} is in checkpoint format {found} and this weft reads up to {FORMAT}: install a newer weft"
        )
    if found < OLDEST:
        raise ValueError(
            f"{file} is in checkpoint format {found} and this weft reads from {OLDEST} on: "
            "load and save it once with the weft that is named in its state.json, or one release later"
        )


class DamageError(ValueError):
    """A checkpoint, or a file of it, is not what was written."""


def check_cover(file: str, regions: Iterable[RegionRecord], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """That the regions hold every number of every tensor (name → dims) of a file, and each once.

    Raises:
        DamageError: names the tensor.
    """
    boxes: dict[str, list[RegionRecord]] = defaultdict(list)
    for region in regions:
        boxes[region.tensor].append(region)
    for name in sorted(boxes.keys() - tensors.keys()):
        raise DamageError(f"{file} has no tensor {name}, of which {boxes[name][0]} was written")
    for name, dims in tensors.items():
        parts = sorted(boxes[name], key=lambda region: region.start)
        for part in parts:
            ends = zip(part.start, part.stop, dims, strict=True) if len(part.start) == len(dims) else ()
            if len(part.start) != len(dims) or not all(0 <= start < stop <= size for start, stop, size in ends):
                raise DamageError(f"{file}: {part} is not inside of the tensor, whose dims are {list(dims)}")
        for one, other in _touching(parts):
            raise DamageError(f"{file}: {one} and {other} were both written; one process may write a number")
        written, count = sum(part.count for part in parts), prod(dims)
        if written != count:
            raise DamageError(f"{file}: of the {count} numbers of {name}, only {written} were written by any process")


def _touching(parts: list[RegionRecord]) -> Iterable[tuple[RegionRecord, RegionRecord]]:
    """Pairs that share a number, among boxes sorted by their start."""
    open_: list[RegionRecord] = []
    for part in parts:
        # boxes of rows that ended before this one starts cannot meet it, nor any later one
        open_ = [other for other in open_ if not other.stop or other.stop[0] > part.start[0]]
        for other in open_:
            spans = zip(part.start, part.stop, other.start, other.stop, strict=True)
            if all(start < other_stop and other_start < stop for start, stop, other_start, other_stop in spans):
                yield other, part
        open_.append(part)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
