"""Tensors of KServe v2: a name, a datatype, a shape, and elements that come as JSON, as bytes, or as gRPC's own fields.

Everything here is from a stranger. Nothing is allocated by what a shape claims: it is held against the elements that are
there, and those are bounded by the body that carried them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["DATATYPES", "Tensor", "from_json", "from_raw", "shown"]

DATATYPES: dict[str, np.dtype[Any] | None] = {
    "BOOL": np.dtype("?"),
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": None,
}
"""How an element lies in bytes; BYTES: four bytes of length, little endian, and then as many."""

MAX_DIMS = 8
MAX_NESTING = 32
"""Lists within lists that JSON data may have; Python's own parser would give up at about a thousand."""
MAX_WHOLE = 2**53
"""Whole numbers up to this one are floats too, exactly."""


def shown(text: object) -> str:
    """A stranger's word as an error repeats it: short."""
    words = str(text)
    return repr(words if len(words) <= 64 else words[:61] + "...")


@dataclass(frozen=True)
class Tensor:
    """Elements in row-major order: bytes of BYTES, else bools, ints or floats as the datatype says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]

    def to_raw(self) -> bytes:
        """As the binary tensor extension and `raw_output_contents` carry it."""
        dtype = DATATYPES[self.datatype]
        if dtype is None:
            return b"".join(struct.pack("<I", len(value)) + value for value in self.values)
        return np.array(self.values, dtype=dtype).tobytes()

    def to_json(self) -> list[Any]:
        """As JSON data carry it: flat, bytes as text, and null for what is no finite number, of which JSON has none."""
        if self.datatype == "BYTES":
            return [value.decode("utf-8", "replace") for value in self.values]
        return [value if math.isfinite(value) else None for value in self.values]


def count_of(name: object, datatype: object, shape: object) -> int:
    """How many elements a tensor of this head has.

    Raises:
        ValueError: the name, the datatype or the shape is none.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"an input's name is {shown(name)}; it must be a text")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise ValueError(f"input {shown(name)}: no datatype {shown(datatype)}; there are {', '.join(DATATYPES)}")
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) > MAX_DIMS:
        raise ValueError(f"input {shown(name)}: the shape must be a list of at most {MAX_DIMS} sizes")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"input {shown(name)}: a size in the shape is not a number from 0 up")
    return math.prod(shape)


def from_raw(name: Any, datatype: Any, shape: Any, data: bytes | memoryview) -> Tensor:
    """
    Raises:
        ValueError: the head is none, or says otherwise than `data`.
    """
    count = count_of(name, datatype, shape)
    dtype = DATATYPES[datatype]
    if dtype is None:
        return Tensor(name, datatype, tuple(shape), _texts(name, count, data))
    if len(data) != count * dtype.itemsize:
        raise ValueError(
            f"input {shown(name)}: {len(data)} bytes came; {count} elements of {datatype} are {count * dtype.itemsize}"
        )
    return Tensor(name, datatype, tuple(shape), np.frombuffer(data, dtype).tolist())


def _texts(name: str, count: int, data: bytes | memoryview) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(found) < count:
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):
            break
        found.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(data) or len(found) != count:
        raise ValueError(
            f"input {shown(name)}: the bytes are not {count} elements of BYTES, each its length in four bytes and itself"
        )
    return found


def from_json(name: Any, datatype: Any, shape: Any, data: Any) -> Tensor:
    """
    Args:
        data: elements in row-major order, flat or in lists within lists.

    Raises:
        ValueError: the head is none, or says otherwise than `data`.
    """
    count = count_of(name, datatype, shape)
    if datatype == "FP16":
        raise ValueError(f"input {shown(name)}: FP16 cannot come as JSON; send it as binary data, or as FP32")
    if not isinstance(data, list):
        raise ValueError(f"input {shown(name)}: its data must be a list of elements")
    values = [_element(name, datatype, value) for value in _flat(name, data)]
    if len(values) != count:
        raise ValueError(f"input {shown(name)}: {len(values)} elements came; its shape has {count}")
    return Tensor(name, datatype, tuple(shape), values)


def _flat(name: str, data: list[Any], depth: int = 1) -> Iterator[Any]:
    if depth > MAX_NESTING:
        raise ValueError(f"input {shown(name)}: its lists are more than {MAX_NESTING} deep")
    for value in data:
        if isinstance(value, list):
            yield from _flat(name, value, depth + 1)
        else:
            yield value


def _element(name: str, datatype: str, value: Any) -> Any:
    """One element of JSON data as its datatype has it."""
    dtype = DATATYPES[datatype]
    if dtype is None:
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
    elif dtype.kind == "b":
        if isinstance(value, bool):
            return value
    elif dtype.kind == "f":
        if isinstance(value, float) or (type(value) is int and abs(value) <= MAX_WHOLE):
            return float(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        limits = np.iinfo(dtype)
        if limits.min <= value <= limits.max:
            return value
    raise ValueError(f"input {shown(name)}: {shown(value)} is no element of {datatype}")
