"""One inference as both of KServe's protocols and `generate` mean it, and what the engine is asked for it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.serve.requests.request import Output, TokenLogprob
from weft.serve.server.kserve.signature import OUTPUTS, read
from weft.serve.server.kserve.tensors import Tensor, shown

__all__ = ["Call", "Response", "answer", "make_call"]

MAX_ID = 256
DEFAULT_TOKENS = 16
"""New tokens where a request names no number, as in OpenAI's completions and vLLM's."""
SAMPLING = {
    "max_tokens", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "seed", "ignore_eos",
}  # fmt: skip
"""Inputs that are `Sampling`'s own, by its names."""


@dataclass(frozen=True)
class Call:
    """
    Attributes:
        id: the client's name for it, which goes into every response.
        settings: inputs by name, read.
        wanted: outputs that are sent; None: all that there are.
        priority: smaller goes first.
        deadline: on `time.monotonic`'s clock; None: the client named none.
    """

    id: str
    settings: dict[str, Any]
    wanted: tuple[str, ...] | None = None
    priority: int = 0
    deadline: float | None = None

    @property
    def stream(self) -> bool:
        """Whether responses come as the text does."""
        return bool(self.settings.get("stream", False))

    @property
    def prefix(self) -> str:
        """What the text begins with: nothing, or the prompt."""
        return "" if self.settings.get("exclude_input_in_output", True) else self.settings.get("text_input", "")

    def alternatives(self, of: str) -> int | None:
        """How many of the most probable tokens are told at each place; None: not even the token's own probability.

        Args:
            of: "prompt_", or "" for the new ones.
        """
        return self.settings.get(f"{of}logprobs", 0 if self.settings.get(f"return_{of}logprobs") else None)

    def sampling(self, eos: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of `Sampling`."""
        given = self.settings
        found = {name: given[name] for name in SAMPLING & given.keys()}
        found.setdefault("max_tokens", DEFAULT_TOKENS)
        top_k = given.get("top_k", 0)
        return found | {
            "top_k": None if top_k in (0, -1) else top_k, "stop": tuple(given.get("stop", ())),
            "stop_ids": tuple(given.get("stop_token_ids", ())), "eos": eos,
        }  # fmt: skip


@dataclass(frozen=True)
class Response:
    """One of a call's responses.

    Attributes:
        version: of the weights that gave it.
        final: no other one follows.
    """

    version: str
    tensors: list[Tensor]
    final: bool


def make_call(
    id: Any, tensors: Iterable[Tensor], parameters: Mapping[str, Any], wanted: Sequence[Any] | None = None,
    timeout: float | None = None,
) -> Call:  # fmt: skip
    """
    Args:
        parameters: those of the request that are no reserved words of the protocol are inputs too.
        wanted: names of outputs.
        timeout: seconds that the transport leaves it.

    Raises:
        ValueError: something is unknown, double, or of the wrong type.
    """
    if not isinstance(id, str) or len(id) > MAX_ID:
        raise ValueError(f"the id must be a text of at most {MAX_ID} characters")
    given: dict[str, Any] = {}
    for name, value in [(tensor.name, list(tensor.values)) for tensor in tensors] + list(_settings(parameters)):
        if name in given:
            raise ValueError(f"{shown(name)} is given twice")
        given[name] = read(name, value)
    for name, value in _table(given.pop("sampling_parameters", "{}")).items():
        given.setdefault(name, read(name, value))
    if unknown := [name for name in wanted or () if name not in OUTPUTS]:
        raise ValueError(f"the model has no output {shown(unknown[0])}; it has {', '.join(OUTPUTS)}")
    priority = parameters.get("priority", 0)
    if type(priority) is not int or abs(priority) >= 2**31:
        raise ValueError("priority must be a whole number of 32 bits; smaller goes first")
    micro = parameters.get("timeout", 0)
    if type(micro) is not int or not 0 <= micro < 2**63:
        raise ValueError("timeout must be a whole number of microseconds; 0: none")
    left = min(timeout if timeout is not None else math.inf, micro / 1e6 if micro else math.inf)
    deadline = None if left == math.inf else time.monotonic() + left
    return Call(id, given, None if wanted is None else tuple(wanted), priority, deadline)


def _table(text: str) -> dict[str, Any]:
    """More inputs, which those that have a place of their own go before.

    Raises:
        ValueError: the text is no JSON table.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError('sampling_parameters must be a JSON table, as {"temperature": 0.8}')
    return found


RESERVED = {"priority", "timeout", "binary_data_output", "triton_enable_empty_final_response"}
"""Parameters that mean something to the protocol."""


def _settings(parameters: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Parameters that are inputs.

    Raises:
        ValueError: the client means to go on with a sequence, of which the server keeps no state.
    """
    for name, value in parameters.items():
        if name.startswith("sequence_"):
            raise ValueError("sequence_id: no state is kept between requests; send the whole prompt")
        if name not in RESERVED:
            yield name, value


def answer(outputs: Sequence[Output], wanted: tuple[str, ...] | None, prefix: str = "") -> list[Tensor]:
    """The tensors of one response.

    Args:
        outputs: of one completion, one after the other: all of them, or what came since the last response.
        prefix: what the text begins with.
    """
    last = outputs[-1]
    tokens = [token for output in outputs for token in output.tokens]
    found = [
        Tensor("text_output", "BYTES", (1,), ["".join([prefix, *(output.text for output in outputs)]).encode()]),
        Tensor("output_ids", "INT64", (len(tokens),), tokens),
    ]
    if last.finish is not None:
        found.append(Tensor("finish_reason", "BYTES", (1,), [last.finish.encode()]))
    if any(output.logprobs is not None for output in outputs):
        found += told("", [one for output in outputs for one in output.logprobs or ()])
    for output in outputs:
        if output.prompt_logprobs is not None:
            found += told("prompt_", [one for one in output.prompt_logprobs if one is not None])
    return [tensor for tensor in found if wanted is None or tensor.name in wanted]


def told(of: str, tokens: Sequence[TokenLogprob]) -> list[Tensor]:
    """Log-probabilities of these tokens, and of the most probable ones in their place.

    Args:
        of: "prompt_", or "" for the new ones.
    """
    found = [Tensor(f"{of}logprobs", "FP32", (len(tokens),), [one.logprob for one in tokens])]
    if tokens and tokens[0].top:
        shape = (len(tokens), len(tokens[0].top))
        found.append(Tensor(f"top_{of}logprobs", "FP32", shape, [logprob for one in tokens for _, logprob in one.top]))
        found.append(Tensor(f"top_{of}ids", "INT64", shape, [token for one in tokens for token, _ in one.top]))
    return found
