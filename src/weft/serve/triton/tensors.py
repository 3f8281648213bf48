"""What a model of weft takes and gives inside of Triton: one table for the config, the backend and the README. Torch-free.

Names are those that the field's clients send: `text_input`, `stream`, `sampling_parameters` and `return_logprobs` as
Triton's vLLM backend has them, the settings of sampling as the OpenAI API and vLLM do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from weft.serve.requests.request import Sampling

AGAIN = "try again in"
"""Words of every refusal that passes: Triton gives its HTTP clients 400 for any error, so that they are the difference."""

PYTHON = {"STRING": str, "BOOL": bool, "INT32": int, "INT64": int, "FP32": float}


@dataclass(frozen=True)
class Tensor:
    """An input or output: what a client calls it, and what it means.

    Attributes:
        kind: Triton's data type, without TYPE_.
        many: any number of elements, not one.
    """

    name: str
    kind: str
    what: str
    many: bool = False


INPUTS = (
    Tensor("text_input", "STRING", "the prompt"),
    Tensor("input_ids", "INT64", "the prompt as token ids, instead", many=True),
    Tensor("stream", "BOOL", "a response for every few tokens; false: one, at the end"),
    Tensor("exclude_input_in_output", "BOOL", "false: the first text begins with the prompt"),
    Tensor("return_logprobs", "BOOL", "the log-probability of each new token"),
    Tensor("return_prompt_logprobs", "BOOL", "the log-probability of each token of the prompt but the first"),
    Tensor("sampling_parameters", "STRING", "a JSON table of any of the following"),
    Tensor("max_tokens", "INT32", "new tokens at most"),
    Tensor("min_tokens", "INT32", "no end before so many"),
    Tensor("temperature", "FP32", "0 takes the most probable token"),
    Tensor("top_k", "INT32", "choose among so many; -1: all"),
    Tensor("top_p", "FP32", "choose among the fewest with this probability together"),
    Tensor("min_p", "FP32", "leave out tokens less probable than this share of the best one"),
    Tensor("seed", "INT64", "makes sampling repeatable"),
    Tensor("stop", "STRING", "texts that end it", many=True),
    Tensor("stop_token_ids", "INT32", "ids that end it", many=True),
    Tensor("ignore_eos", "BOOL", "the model's end tokens end nothing"),
    Tensor("repetition_penalty", "FP32", "of tokens that are there already; 1: none"),
    Tensor("frequency_penalty", "FP32", "for every time that the text has the token"),
    Tensor("presence_penalty", "FP32", "once, if the text has the token"),
    Tensor("n", "INT32", "completions of the prompt, at a temperature above 0; see lengths"),
    Tensor("json_schema", "STRING", "the text is JSON of this schema"),
    Tensor("regex", "STRING", "the text matches this regular expression, as a whole"),
    Tensor("lark", "STRING", "the text is of this grammar, in Lark's notation"),
    Tensor("lora_name", "STRING", "an adapter, of those that model.json names"),
    Tensor("priority", "INT32", "smaller goes first"),
)
"""All optional but for one of the first two. Each may also be given as a parameter of the request."""

OUTPUTS = (
    Tensor("text_output", "STRING", "new text, of each of n completions", many=True),
    Tensor("output_ids", "INT64", "new token ids, one completion's after the other's", many=True),
    Tensor("lengths", "INT32", "how many of output_ids each completion has; where n is above 1", many=True),
    Tensor("finish_reason", "STRING", "stop, length or deadline, of each; in the last response alone", many=True),
    Tensor("logprobs", "FP32", "of each new token, where asked for", many=True),
    Tensor("prompt_logprobs", "FP32", "where asked for, in one response alone", many=True),
)

RESERVED = (
    "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output",
)  # fmt: skip
"""Parameters that Triton takes for itself; so does every `triton_…`."""

_INPUTS = {tensor.name: tensor for tensor in INPUTS}
_DIRECT = (
    "max_tokens", "min_tokens", "temperature", "top_p", "min_p", "seed", "ignore_eos", "repetition_penalty",
    "frequency_penalty", "presence_penalty",
)  # fmt: skip


def read_values(tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All that a request says, each value of its type: tensors before `sampling_parameters`, and those before parameters.

    Raises:
        ValueError: a name that is unknown, or a value of another type.
    """
    plain = {name: value for name, value in parameters.items() if not _reserved(name)}
    table = tensors.get("sampling_parameters", plain.pop("sampling_parameters", None))
    found = {**plain, **({} if table is None else _table(table)), **tensors}
    found.pop("sampling_parameters", None)
    if unknown := sorted(found.keys() - _INPUTS.keys()):
        raise ValueError(f"{', '.join(unknown)}: unknown; a request may have {', '.join(_INPUTS)}")
    return {name: _typed(_INPUTS[name], value) for name, value in found.items()}


def prompt_of(values: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """
    Raises:
        ValueError: there is no prompt, or two, or it is a text and there is no tokenizer.
    """
    if ("text_input" in values) == ("input_ids" in values):
        raise ValueError("give the prompt as text_input, or as input_ids")
    if "input_ids" in values:
        return values["input_ids"]
    if tokenizer is None:
        raise ValueError("text_input needs a tokenizer, and the model's folder has none: give input_ids")
    return tokenizer.encode(values["text_input"]).ids


def sampling_of(values: Mapping[str, Any], eos: tuple[int, ...]) -> Sampling:
    """
    Raises:
        ValueError: as Sampling.
    """
    top_k = values.get("top_k", -1)
    return Sampling(
        **{name: values[name] for name in _DIRECT if name in values},
        top_k=None if top_k == -1 else top_k,
        stop=tuple(values.get("stop", ())),
        stop_ids=tuple(values.get("stop_token_ids", ())),
        eos=eos,
    )


def _reserved(name: str) -> bool:
    return name in RESERVED or name.startswith("triton_")


def _table(text: Any) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"sampling_parameters is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError('sampling_parameters must be a JSON table, as {"temperature": 0.8}')
    return table


def _typed(tensor: Tensor, value: Any) -> Any:
    if not tensor.many:
        return _one(tensor, value)
    return [_one(tensor, one) for one in (value if isinstance(value, list) else [value])]


def _one(tensor: Tensor, value: Any) -> Any:
    """A number may also come as text, as vLLM's clients send it."""
    python = PYTHON[tensor.kind]
    if python in (str, bool):
        if isinstance(value, python):
            return value
    elif not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            number = python(value)
            if isinstance(value, str) or number == value:
                return number
    word = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}[python]
    raise ValueError(f"{tensor.name} is {value!r}; it must be {word}")
