"""Inspection: compare a checkpoint on disk with its manifest, byte for byte. Torch-free.

It reads the files by itself, apart from the code that wrote them: an error in that code shows here as damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.folder import MANIFEST
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
    tasks = [
        (name, record, tensor)
        for name, record in manifest.files.items()
        if name not in absent
        for tensor in (sorted({region.tensor for region in record.regions}) if record.header else [""])
    ]
    share = tasks[rank::world]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda task: list(_inspect(path, *task)), share)
    return list(dict.fromkeys(finding for task in [findings, *found] for finding in task))


def _inspect(path: Path, name: str, record: FileRecord, tensor: str) -> Iterator[Finding]:
    """The differences of a small file, or of one tensor in a large one."""
    file = path / name
    try:
        if record.header is None:
            if hashlib.sha256(file.read_bytes()).hexdigest() != record.sha256:
                yield Finding(str(path), name, "its content is not what was written (sha256 differs)")
            return
        header = read_header(file)
        if hashlib.sha256(header).hexdigest() != record.header:
            yield Finding(str(path), name, "its header is not what was written (sha256 differs)")
            return
        tensors = {key: value for key, value in json.loads(header[8:]).items() if key != "__metadata__"}
        check_cover(name, record.regions, {key: tuple(value["shape"]) for key, value in tensors.items()})
        if not tensor:
            return
        regions = [region for region in record.regions if region.tensor == tensor]
        digests = _digests(file, len(header), tensors[tensor], regions)
    except (OSError, DamageError) as error:
        yield Finding(str(path), name, f"cannot be read: {error}", tensor)
        return
    for region, digest in zip(regions, digests, strict=True):
        if digest != region.sha256:
            problem = "its numbers are not those that were written (sha256 differs)"
            yield Finding(str(path), name, problem, tensor, str(region))


def read_header(file: Path) -> bytes:
    """The first bytes of a safetensors file, before the numbers: the length in 8 bytes, and the JSON."""
    with file.open("rb") as stream:
        length = stream.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > min(_LARGEST_HEADER, file.stat().st_size - 8):
            raise DamageError(f"{file} is no safetensors file: its header would be {count} bytes long")
        return length + stream.read(count)


def _digests(file: Path, header: int, entry: dict[str, Any], regions: list[RegionRecord]) -> list[str]:
    """The sha256 of each region of one tensor, all in one pass over its rows."""
    dims = tuple(entry["shape"]) or (1,)
    begin, end = entry["data_offsets"]
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
    known = {*manifest.files, MANIFEST}
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir()]
    problem = "is not part of the checkpoint; it was put here later and is not read"
    return [Finding(str(path), name, problem, damaging=False) for name in names if name not in known]
