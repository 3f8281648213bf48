"""What a language model looks like to KServe: the tensors that go into it and come out. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["INPUTS", "OUTPUTS", "Field", "config", "metadata", "read"]


@dataclass(frozen=True)
class Field:
    """A tensor of the model.

    Attributes:
        shape: (1,): one element; -1: any number of them.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)


MANY = (-1,)


INPUTS = {
    field.name: field
    for field in (
        Field("text_input", "BYTES"), Field("input_ids", "INT64", MANY), Field("max_tokens", "INT32"),
        Field("min_tokens", "INT32"), Field("temperature", "FP32"), Field("top_k", "INT32"), Field("top_p", "FP32"),
        Field("min_p", "FP32"), Field("repetition_penalty", "FP32"), Field("frequency_penalty", "FP32"),
        Field("presence_penalty", "FP32"), Field("seed", "INT64"), Field("stop", "BYTES", MANY),
        Field("stop_token_ids", "INT32", MANY), Field("ignore_eos", "BOOL"), Field("logprobs", "INT32"),
        Field("prompt_logprobs", "INT32"),
        Field("json_schema", "BYTES"), Field("regex", "BYTES"), Field("lark", "BYTES"), Field("stream", "BOOL"),
        Field("sampling_parameters", "BYTES"), Field("exclude_input_in_output", "BOOL"),
        Field("return_logprobs", "BOOL"), Field("return_prompt_logprobs", "BOOL"),
    )
}  # fmt: skip
"""A prompt as text or as ids, and how to continue it: names and meanings of `Sampling`, and what vLLM calls the rest. The
last four are those of Triton's vLLM backend, and of weft's in Triton (`serve/triton/tensors.py`)."""

OUTPUTS = {
    field.name: field
    for field in (
        Field("text_output", "BYTES"), Field("output_ids", "INT64", MANY), Field("finish_reason", "BYTES"),
        Field("logprobs", "FP32", MANY), Field("top_logprobs", "FP32", (-1, -1)),
        Field("top_ids", "INT64", (-1, -1)), Field("prompt_logprobs", "FP32", MANY),
        Field("top_prompt_logprobs", "FP32", (-1, -1)), Field("top_prompt_ids", "INT64", (-1, -1)),
    )
}  # fmt: skip
"""New text and ids; why it ended (in the last response); and, if `logprobs` was k, log-probabilities of the new tokens and,
k for each of them, of the most probable ones; the same of the prompt's tokens but the first (in the first response)."""

KINDS = {"BYTES": (str, "text"), "BOOL": (bool, "true or false"), "FP32": (float, "number")}


def read(name: str, value: Any) -> Any:
    """The value of an input, as the engine takes it: from a tensor's elements, or from a JSON field or a parameter.

    Args:
        value: one element or a list of them; texts as str or as the bytes of UTF-8.

    Raises:
        ValueError: the model has no such input, or it has another type or number of elements.
    """
    field = INPUTS.get(name)
    if field is None:
        raise ValueError(f"the model has no input {name[:64]!r}; it has {', '.join(INPUTS)}")
    values = [_element(field, one) for one in (value if isinstance(value, list) else [value])]
    if field.shape == MANY:
        return values
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} elements; it must have one")
    return values[0]


def _element(field: Field, value: Any) -> Any:
    kind, words = KINDS.get(field.datatype, (int, "whole number"))
    if kind is str and isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{field.name} is not UTF-8") from None
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{field.name} has an element that is no {words}")
    return value


def metadata(name: str, version: str) -> dict[str, Any]:
    """Of KServe's model metadata, in JSON and, by the same names, in gRPC's message."""
    return {"name": name, "versions": [version], "platform": "weft"} | {
        side: [{"name": it.name, "datatype": it.datatype, "shape": list(it.shape)} for it in fields.values()]
        for side, fields in (("inputs", INPUTS), ("outputs", OUTPUTS))
    }


def config(name: str, has_text: bool) -> dict[str, Any]:
    """Of Triton's model configuration.

    `decoupled`, by which a model says that only streams can carry its answers, is false: without `stream` there is one
    response, on every route.

    Args:
        has_text: there is a tokenizer; else the prompt must be ids.
    """
    needed = "text_input" if has_text else "input_ids"
    return {
        "name": name, "platform": "weft", "backend": "weft", "max_batch_size": 0,
        "input": [_configured(it) | {"optional": it.name != needed} for it in INPUTS.values()],
        "output": [_configured(it) for it in OUTPUTS.values()],
        "model_transaction_policy": {"decoupled": False},
    }  # fmt: skip


def _configured(field: Field) -> dict[str, Any]:
    kind = "STRING" if field.datatype == "BYTES" else field.datatype
    return {"name": field.name, "data_type": f"TYPE_{kind}", "dims": list(field.shape)}
