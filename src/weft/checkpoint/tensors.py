"""One safetensors file, read and written by region, in place, by any number of processes at once.

The layout is that of the safetensors library: length of the header (u64, little-endian), header (JSON, padded with
spaces to 8 bytes), data without gaps. A header is taken for hostile until every number in it has been checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""

DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""In the order in which the library lays them down: wide numbers first, so that every tensor is aligned."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RAW = {1: (torch.uint8, "<u1"), 2: (torch.int16, "<i2"), 4: (torch.int32, "<i4"), 8: (torch.int64, "<i8")}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, before or after it has a place there."""

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file.

    Attributes:
        entries: name → its tensor, in the order of the data.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Open a file and check its header.

        Raises:
            ValueError: the file is not a whole, well-formed safetensors file; says what is wrong.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            self.entries, self._offsets = _read_header(path, self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, name: str, start: tuple[int, ...] | None = None, stop: tuple[int, ...] | None = None) -> Tensor:
        """A copy of the box from `start` to `stop` of a tensor; of all of it by default."""
        entry = self.entry(name)
        start, stop = _edges(self.path, entry, start, stop)
        raw, kind = _RAW[entry.dtype.itemsize]
        dims = tuple(b - a for a, b in zip(start, stop, strict=True))
        box = np.empty(dims, dtype=kind)
        flat = box.reshape(-1).view(np.uint8)
        done = 0
        for offset, length in _runs(entry, start, stop):
            self._pread(flat[done : done + length], self._offsets[name] + offset)
            done += length
        assert done == box.nbytes
        tensor = torch.from_numpy(box)
        assert tensor.dtype == raw
        return tensor.view(entry.dtype)

    def write(
        self, name: str, tensor: Tensor, start: tuple[int, ...] | None = None, stop: tuple[int, ...] | None = None
    ) -> str:
        """Write a box in place; the sha256 of its bytes, in row order, comes back.

        Each run of neighbouring bytes is one positioned write. A shared memory map would write whole pages, and where
        two hosts write neighbouring columns on a network file system, the later page would undo the earlier.
        """
        entry = self.entry(name)
        start, stop = _edges(self.path, entry, start, stop)
        dims = tuple(b - a for a, b in zip(start, stop, strict=True))
        assert tuple(tensor.shape) == dims, (name, tuple(tensor.shape), dims)
        assert tensor.dtype == entry.dtype, (name, tensor.dtype, entry.dtype)
        raw, _ = _RAW[entry.dtype.itemsize]
        data = tensor.detach().cpu().contiguous().view(raw).reshape(-1).numpy().view(np.uint8)
        done = 0
        for offset, length in _runs(entry, start, stop):
            self._pwrite(data[done : done + length], self._offsets[name] + offset)
            done += length
        assert done == data.nbytes
        return hashlib.sha256(data.data).hexdigest()

    def digest(self, name: str, start: tuple[int, ...] | None = None, stop: tuple[int, ...] | None = None) -> str:
        """sha256 of the bytes of a box as they lie in the file now: what `write` gave, if nothing was lost."""
        entry = self.entry(name)
        digest = hashlib.sha256()
        buffer = np.empty(1 << 22, dtype=np.uint8)
        for offset, length in _runs(entry, *_edges(self.path, entry, start, stop)):
            for begin in range(0, length, buffer.nbytes):
                part = buffer[: min(buffer.nbytes, length - begin)]
                self._pread(part, self._offsets[name] + offset + begin)
                digest.update(part.data)
        return digest.hexdigest()

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.path} holds no tensor {name!r}")
        return self.entries[name]

    def sync(self) -> None:
        """Return when what this process wrote is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pread(self, into: np.ndarray, offset: int) -> None:
        view, done = into.data, 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{self.path} ended at byte {offset + done}: it was cut while it was read")
            done += count

    def _pwrite(self, data: np.ndarray, offset: int) -> None:
        view, done = data.data, 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)


def create(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write the header and give the file its size; the data is zeros, and takes no room until it is written."""
    assert len({entry.name for entry in entries}) == len(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    order = list(DTYPES.values())
    for entry in sorted(entries, key=lambda entry: (order.index(entry.dtype), entry.name)):
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.sizes),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path.name}: {len(entries)} tensors are too many for one file; make the shards smaller")
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _edges(
    path: Path, entry: Entry, start: tuple[int, ...] | None, stop: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = (0,) * len(entry.sizes) if start is None else start
    stop = entry.sizes if stop is None else stop
    inside = len(start) == len(stop) == len(entry.sizes)
    if not inside or not all(0 <= a <= b <= n for a, b, n in zip(start, stop, entry.sizes, strict=True)):
        raise ValueError(f"{path}: {entry.name} is {list(entry.sizes)}; {start} to {stop} does not lie inside it")
    return start, stop


def _runs(entry: Entry, start: tuple[int, ...], stop: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Offset and length, in bytes, of each contiguous part of a box, in row order. Whole trailing dims join."""
    if any(a == b for a, b in zip(start, stop, strict=True)):
        return
    inner = len(entry.sizes)
    length = entry.dtype.itemsize
    while inner > 0 and (start[inner - 1], stop[inner - 1]) == (0, entry.sizes[inner - 1]):
        inner -= 1
        length *= entry.sizes[inner]
    strides = [entry.dtype.itemsize * math.prod(entry.sizes[dim + 1 :]) for dim in range(inner)]
    if inner == 0:
        yield 0, length
        return
    last = inner - 1
    base, run = start[last] * strides[last], (stop[last] - start[last]) * length
    for index in np.ndindex(*(b - a for a, b in zip(start[:last], stop[:last], strict=True))):
        rows = zip(index, start[:last], strides[:last], strict=True)
        yield base + sum((i + a) * stride for i, a, stride in rows), run


def _read_header(path: Path, fd: int) -> tuple[dict[str, Entry], dict[str, int]]:
    """Entries by name, and where in the file the data of each begins."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise ValueError(f"{path} is {size} bytes long, too short for a safetensors file")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"{path}: its header claims {length} bytes of a file of {size}; it is damaged or something else"
        )
    text = bytearray(length)
    if os.preadv(fd, [text], 8) != length:
        raise ValueError(f"{path} ended inside its header")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not the JSON of a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is not a table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ in its header is not a table of texts")
    spans = sorted((_read_entry(path, name, item) for name, item in header.items()), key=lambda span: span[1:])
    end = 0
    for entry, begin, stop in spans:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise ValueError(f"{path}: {entry.name} {what} (bytes {begin} and {end})")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{path} is {size} bytes long, but its header describes {8 + length + end}")
    return {entry.name: entry for entry, _, _ in spans}, {entry.name: 8 + length + begin for entry, begin, _ in spans}


def _read_entry(path: Path, name: str, item: Any) -> tuple[Entry, int, int]:
    """A tensor, and the bytes where it begins and ends in the data."""
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {kind!r}; weft knows {', '.join(DTYPES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(shape) > 32 or len(offsets) != 2:
        raise ValueError(
            f"{path}: {name} has shape {shape!r:.80} and data_offsets {offsets!r:.80}; they must be counts"
        )
    entry = Entry(name, tuple(shape), DTYPES[kind])
    if offsets[1] - offsets[0] != entry.num_bytes:
        lies = offsets[1] - offsets[0]
        raise ValueError(f"{path}: {name} is {kind} {shape}, so {entry.num_bytes} bytes, but it lies in {lies}")
    return entry, offsets[0], offsets[1]


def _are_counts(items: Any) -> bool:
    return isinstance(items, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in items)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("it names a key twice")
    return table
