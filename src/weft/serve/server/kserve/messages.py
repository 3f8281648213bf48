"""Inference over gRPC: messages read and written."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from weft.serve.server.kserve.call import Call, Response, make_call
from weft.serve.server.kserve.schema import MESSAGES
from weft.serve.server.kserve.tensors import Tensor, from_json, from_raw, shown
from weft.serve.server.kserve.wire import MAX_TENSORS

__all__ = ["decode", "read_call", "written"]

CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""Where the elements are that do not come as raw bytes; of FP16, nowhere."""


def decode(kind: str, data: bytes) -> Any:
    """
    Raises:
        ValueError: the bytes are no such message.
    """
    try:
        return MESSAGES[kind].FromString(data)
    except DecodeError:
        raise ValueError(f"the bytes are no {kind}") from None


def values(parameters: Any) -> dict[str, Any]:
    """A map of parameters in Python's own types; one without a value is left out."""
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(value, kind)
    return found


def read_call(message: Any, seconds: float | None) -> Call:
    """
    Args:
        message: ModelInferRequest.
        seconds: that the client will wait; None: any number.

    Raises:
        ValueError: says which part is not as it must be.
    """
    if len(message.inputs) > MAX_TENSORS or len(message.outputs) > MAX_TENSORS:
        raise ValueError(f"there may be {MAX_TENSORS} inputs and outputs at most")
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise ValueError(
            f"raw_input_contents has {len(raw)} items for {len(message.inputs)} inputs; all or none are raw"
        )
    for one in (*message.inputs, *message.outputs):
        if one.parameters:
            name = next(iter(one.parameters))
            raise ValueError(
                f"{shown(one.name)}: the parameter {shown(name)} is not supported; elements come in the message: "
                "shared memory is not taken"
            )
    tensors = [_tensor(one, raw[at] if raw else None) for at, one in enumerate(message.inputs)]
    wanted = [one.name for one in message.outputs] or None
    return make_call(message.id, tensors, values(message.parameters), wanted, seconds)


def _tensor(one: Any, raw: bytes | None) -> Tensor:
    shape = list(one.shape)
    if raw is not None:
        if one.HasField("contents"):
            raise ValueError(f"input {shown(one.name)} has both contents and raw_input_contents; leave one out")
        return from_raw(one.name, one.datatype, shape, raw)
    if one.datatype == "BYTES":
        return _texts(one, shape)
    field = CONTENTS.get(one.datatype)
    if field is None and one.datatype == "FP16":
        raise ValueError(f"input {shown(one.name)}: FP16 comes in raw_input_contents only")
    return from_json(one.name, one.datatype, shape, list(getattr(one.contents, field)) if field else [])


def _texts(one: Any, shape: list[int]) -> Tensor:
    found = list(one.contents.bytes_contents)
    return from_raw(one.name, "BYTES", shape, Tensor(one.name, "BYTES", (len(found),), found).to_raw())


def written(call: Call, model: str, response: Response, streamed: bool = False) -> dict[str, Any]:
    """The fields of ModelInferResponse.

    Args:
        streamed: it is one of a stream's, and says whether it is its request's last.
    """
    found: dict[str, Any] = {
        "model_name": model, "model_version": response.version, "id": call.id,
        "outputs": [
            {"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in response.tensors
        ],
        "raw_output_contents": [one.to_raw() for one in response.tensors],
    }  # fmt: skip
    return found | final(response.final) if streamed else found


def final(last: bool) -> dict[str, Any]:
    """The parameter by which a client of a stream knows a request's last response."""
    return {"parameters": {"triton_final_response": {"bool_param": last}}}
