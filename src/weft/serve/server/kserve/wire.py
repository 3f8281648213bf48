"""Inference over HTTP: a body of JSON, or of JSON and binary tensors behind it, read and written. Torch-free."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.serve.server.kserve.call import Call, make_call
from weft.serve.server.kserve.tensors import Tensor, from_json, from_raw, shown

__all__ = ["Inference", "inflate", "read_generate", "read_inference", "read_object"]

LENGTH = "inference-header-content-length"
"""The header that says how many bytes of a body are JSON; binary tensors follow."""

MAX_TENSORS = 64
WINDOWS = {"gzip": 31, "deflate": 47}
"""zlib's `wbits`; deflate with or without zlib's own head."""


def inflate(body: bytes, encoding: str, most: int) -> bytes:
    """A body as it was before `Content-Encoding`.

    Raises:
        ValueError: it is none, it would be larger than `most` bytes, or the encoding is unknown.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOWS:
        raise ValueError(f"no content-encoding {shown(encoding)}; there are gzip, deflate and identity")
    inflater = zlib.decompressobj(WINDOWS[encoding])
    try:
        found = inflater.decompress(body, most + 1)
    except zlib.error:
        raise ValueError(f"the body is not {encoding}") from None
    if len(found) > most:
        raise ValueError(f"the body unpacks to more than {most} bytes")
    if not inflater.eof:
        raise ValueError(f"the body is not whole {encoding}")
    return found


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty body is one without fields.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(body) if body.strip() else {}
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("the body must be a JSON object")
    return found


@dataclass(frozen=True)
class Inference:
    """A call, and how its outputs go back.

    Attributes:
        binary: names of outputs that go as binary data.
        all_binary: so do those that are in neither list.
    """

    call: Call
    binary: frozenset[str] = frozenset()
    all_binary: bool = False

    def write(self, model: str, version: str, tensors: Sequence[Tensor]) -> tuple[bytes, dict[str, str]]:
        """The body of the answer, and its headers."""
        outputs, pieces = [], []
        for tensor in tensors:
            head: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if self.all_binary or tensor.name in self.binary:
                pieces.append(tensor.to_raw())
                head["parameters"] = {"binary_data_size": len(pieces[-1])}
            else:
                head["data"] = tensor.to_json()
            outputs.append(head)
        found = {"model_name": model, "model_version": version, "outputs": outputs}
        text = json.dumps(found | ({"id": self.call.id} if self.call.id else {})).encode()
        if not pieces:
            return text, {"content-type": "application/json"}
        return b"".join([text, *pieces]), {"content-type": "application/octet-stream", LENGTH: str(len(text))}


def read_inference(body: bytes, json_bytes: str | None) -> Inference:
    """The body of `infer`.

    Args:
        json_bytes: what `Inference-Header-Content-Length` says; None: it did not come, all is JSON.

    Raises:
        ValueError: says which part is not as it must be.
    """
    size = len(body) if json_bytes is None else _size("Inference-Header-Content-Length", json_bytes, len(body))
    asked, rest = read_object(body[:size]), memoryview(body)[size:]
    tensors = []
    for one in _list(asked, "inputs"):
        tensor, used = _tensor(one, rest)
        tensors.append(tensor)
        rest = rest[used:]
    if rest:
        raise ValueError(f"{len(rest)} bytes follow that belong to no input")
    parameters = _parameters(asked)
    outputs = _list(asked, "outputs") if "outputs" in asked else None
    binary: set[str] = set()
    plain: set[str] = set()
    for output in outputs or ():
        settings = _parameters(output)
        if found := [name for name in settings if name != "binary_data"]:
            raise ValueError(f"an output's parameter {shown(found[0])} is not supported; binary_data is")
        if "binary_data" in settings:
            (binary if settings["binary_data"] is True else plain).add(_name(output))
    all_binary = parameters.get("binary_data_output") is True
    wanted = None if outputs is None else [_name(output) for output in outputs]
    call = make_call(asked.get("id", ""), tensors, parameters, wanted)
    if all_binary and wanted is not None:
        binary |= set(wanted) - plain
    return Inference(call, frozenset(binary), all_binary and wanted is None)


def _tensor(one: dict[str, Any], rest: memoryview) -> tuple[Tensor, int]:
    """One input, and how many bytes of `rest` are its own."""
    parameters = _parameters(one)
    if found := [name for name in parameters if name != "binary_data_size"]:
        raise ValueError(
            f"an input's parameter {shown(found[0])} is not supported: elements come as data, or as binary data; "
            "shared memory is not taken"
        )
    head = one.get("name"), one.get("datatype"), one.get("shape")
    if "binary_data_size" not in parameters:
        return from_json(*head, one.get("data")), 0
    if "data" in one:
        raise ValueError("an input has both data and binary_data_size; leave one out")
    size = _size("binary_data_size", parameters["binary_data_size"], len(rest))
    return from_raw(*head, rest[:size]), size


def _size(what: str, value: Any, most: int) -> int:
    """A number of bytes that are there."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {shown(value)}; it must be a number of bytes, and {most} came")
    return value


def _list(asked: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = asked.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{name} must be a list of objects")
    if len(found) > MAX_TENSORS:
        raise ValueError(f"{len(found)} {name}; there may be {MAX_TENSORS} at most")
    return found


def _name(one: dict[str, Any]) -> str:
    name = one.get("name")
    if not isinstance(name, str):
        raise ValueError("an output has no name")
    return name


def _parameters(one: dict[str, Any]) -> dict[str, Any]:
    found = one.get("parameters", {})
    if not isinstance(found, dict):
        raise ValueError("parameters must be an object")
    return found


def read_generate(body: bytes, stream: bool) -> Call:
    """The body of `generate` or `generate_stream`: inputs are fields of it, or of its `parameters`.

    Args:
        stream: what the route does where the body does not say.

    Raises:
        ValueError: says which part is not as it must be.
    """
    asked = read_object(body)
    id, parameters = asked.pop("id", ""), _parameters(asked)
    asked.pop("parameters", None)
    if double := asked.keys() & parameters.keys():
        raise ValueError(f"{shown(min(double))} is given twice")
    return make_call(id, (), {"stream": stream, **asked, **parameters})


def write_generate(id: str, model: str, version: str, tensors: Sequence[Tensor]) -> Mapping[str, Any]:
    """The object that `generate` answers with: a field for each output, one element by itself."""
    found: dict[str, Any] = {"id": id} if id else {}
    found |= {"model_name": model, "model_version": version}
    for tensor in tensors:
        values = tensor.to_json()
        found[tensor.name] = values[0] if tensor.shape == (1,) and tensor.datatype == "BYTES" else values
    return found
