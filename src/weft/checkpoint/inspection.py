"""Inspection: compare a checkpoint on disk with its manifest, byte for byte. Torch-free.

It reads the files by itself, apart from the code that wrote them: an error in that code shows here as damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from weft.checkpoint.folder import CERTIFICATE, MANIFEST
from weft.checkpoint.manifest import DamageError, FileRecord, Manifest, RegionRecord, check_cover, read_manifest

_CHUNK = 16 << 20  # bytes read at a time
_LARGEST_HEADER = 100 << 20  # bytes; the limit that safetensors itself sets


@dataclass(frozen=True)
class Finding:
    """Something in a checkpoint that is not as it was written."""

    checkpoint: str
    file: str
    problem: str
    tensor: str = ""
    region: str = ""
    damaging: bool = True

    def __str__(self) -> str:
        place = f", {self.region or self.tensor}" if self.tensor else ""
        return f"{self.checkpoint}/{self.file}{place}: {self.problem}"


def glance(path: Path) -> list[Finding]:
    """What the manifest and the sizes of the files show; no content is read.

    Raises:
        ValueError: the checkpoint is in a format that this weft does not read.
    """
    try:
        manifest = read_manifest(path)
    except DamageError as error:
        return [Finding(str(path), MANIFEST, str(error))]
    findings = []
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            findings.append(Finding(str(path), name, "is missing"))
        elif file.stat().st_size != record.size:
            size = file.stat().st_size
            findings.append(Finding(str(path), name, f"has {size} bytes where {record.size} were written"))
    return findings


def inspect(path: Path, rank: int = 0, world: int = 1, threads: int = 2) -> list[Finding]:
    """Every difference between the checkpoint and its manifest that lies in this process's share of the work.

    Args:
        rank, world: the content is shared out over `world` processes; all see what `glance` sees.
        threads: files and tensors that are read at a time.

    Raises:
        ValueError: the checkpoint is in a format that this weft does not read.
    """
    findings = glance(path)
    if findings and findings[0].file == MANIFEST:
        return findings
    manifest = read_manifest(path)
    absent = {finding.file for finding in findings}
    if rank == 0:
        findings += _strangers(path, manifest)
    tasks: list[Callable[[], list[Finding]]] = []
    for name, record in manifest.files.items():
        if name in absent:
            continue
        if record.header is None:
            tasks.append(partial(_inspect_file, path, name, record))
            continue
        try:
            tensors = _Tensors(path, name, record)
        except (OSError, DamageError) as error:
            findings.append(Finding(str(path), name, str(error)))
            continue
        tasks += [partial(_inspect_tensor, tensors, tensor) for tensor in tensors.entries]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda task: task(), tasks[rank::world])
        return [finding for task in [findings, *found] for finding in task]


class _Tensors:
    """A tensor file whose header is the one that was written."""

    def __init__(self, path: Path, name: str, record: FileRecord) -> None:
        self.checkpoint, self.name, self.file = str(path), name, path / name
        header = read_header(self.file)
        if hashlib.sha256(header).hexdigest() != record.header:
            raise DamageError("its header is not what was written (sha256 differs)")
        self.begin = len(header)
        try:
            entries = json.loads(header[8:])
            entries.pop("__metadata__", None)
            self.entries = {tensor: _Entry.model_validate(entry) for tensor, entry in entries.items()}
        except (ValueError, RecursionError, AttributeError) as error:
            raise DamageError(f"its header is not that of a safetensors file: {error}") from error
        self.regions: dict[str, list[RegionRecord]] = {tensor: [] for tensor in self.entries}
        for region in record.regions:
            if region.tensor not in self.regions:
                raise DamageError(f"it has no tensor {region.tensor}, of which {region} was written")
            self.regions[region.tensor].append(region)


class _Entry(BaseModel):
    """What the header says of one tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: list[NonNegativeInt] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _check(self) -> _Entry:
        count = self.data_offsets[1] - self.data_offsets[0]
        if count < 0 or count % max(1, prod(self.shape)):
            raise ValueError(f"{count} bytes are no tensor of dims {self.shape}")
        return self


def _inspect_file(path: Path, name: str, record: FileRecord) -> list[Finding]:
    try:
        same = hashlib.sha256((path / name).read_bytes()).hexdigest() == record.sha256
    except OSError as error:
        return [Finding(str(path), name, f"cannot be read: {error}")]
    return [] if same else [Finding(str(path), name, "its content is not what was written (sha256 differs)")]


def _inspect_tensor(tensors: _Tensors, name: str) -> list[Finding]:
    regions, entry = tensors.regions[name], tensors.entries[name]
    try:
        check_cover(tensors.name, regions, {name: tuple(entry.shape)})
        digests = _digests(tensors.file, tensors.begin, entry, regions)
    except (OSError, DamageError) as error:
        return [Finding(tensors.checkpoint, tensors.name, f"cannot be read: {error}", name)]
    problem = "its numbers are not those that were written (sha256 differs)"
    return [
        Finding(tensors.checkpoint, tensors.name, problem, name, str(region))
        for region, digest in zip(regions, digests, strict=True)
        if digest != region.sha256
    ]


def read_header(file: Path) -> bytes:
    """The first bytes of a safetensors file, before the numbers: the length in 8 bytes, and the JSON."""
    with file.open("rb") as stream:
        length = stream.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > min(_LARGEST_HEADER, file.stat().st_size - 8):
            raise DamageError(f"{file} is no safetensors file: its header would be {count} bytes long")
        return length + stream.read(count)


def _digests(file: Path, header: int, entry: _Entry, regions: list[RegionRecord]) -> list[str]:
    """The sha256 of each region of one tensor, all in one pass over its rows."""
    dims = tuple(entry.shape) or (1,)
    begin, end = entry.data_offsets
    row = (end - begin) // dims[0] if prod(dims) else 0  # bytes
    width = row // max(1, prod(dims[1:]))  # bytes of a number
    hashes = [hashlib.sha256() for _ in regions]
    boxes = [tuple(map(slice, region.start, region.stop)) or (slice(0, 1),) for region in regions]
    rows_at_once = max(1, _CHUNK // max(1, row))
    with file.open("rb") as stream:
        descriptor = stream.fileno()
        for first in range(0, dims[0] if row else 0, rows_at_once):
            last = min(dims[0], first + rows_at_once)
            content = _read(descriptor, header + begin + first * row, (last - first) * row)
            rows = content.reshape(last - first, *dims[1:], width)
            for digest, box in zip(hashes, boxes, strict=True):
                start, stop = max(first, box[0].start), min(last, box[0].stop)
                if start < stop:
                    part = rows[(slice(start - first, stop - first), *box[1:])]
                    digest.update(np.ascontiguousarray(part).data)
    return [digest.hexdigest() for digest in hashes]


def _read(descriptor: int, offset: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    content = np.empty(count, dtype=np.uint8)
    done = 0
    while done < count:
        got = os.preadv(descriptor, [content[done:].data], offset + done)
        if got == 0:
            raise DamageError(f"it ends {count - done} bytes too early")
        done += got
    return content


def _strangers(path: Path, manifest: Manifest) -> list[Finding]:
    """Files that weft did not write. They are never read, so they do no harm here."""
    known = {*manifest.files, MANIFEST, CERTIFICATE}
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir()]
    problem = "is not part of the checkpoint; it was put here later and is not read"
    return [Finding(str(path), name, problem, damaging=False) for name in names if name not in known]
