"""Triton's Python backend, run by weft's engine: many requests at once, each answered as its tokens come.

A repository's `1/model.py` takes `TritonPythonModel` from here. Triton runs it in a process of its own, the stub, which
calls `initialize` once, `execute` for requests that came, and `finalize`. `execute` hands them to the engine and returns;
so the engine, not Triton, makes the batch.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from weft.serve.engine import Engine
from weft.serve.request import Output, RefusedError, Request
from weft.serve.triton.keeper import EngineKeeper
from weft.serve.triton.metrics import Metrics
from weft.serve.triton.replies import Replies, Reply, values_of
from weft.serve.triton.repository import LOADED
from weft.serve.triton.settings import read_settings
from weft.serve.triton.tensors import AGAIN, INPUTS, OUTPUTS, read_values, sampling_of

DTYPES = {"STRING": np.object_, "INT64": np.int64, "FP32": np.float32}
KINDS = {tensor.name: tensor.kind for tensor in OUTPUTS}


class TritonPythonModel:
    """The names and arguments of all methods are Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        weights, config = read_settings(Path(args["model_repository"]) / args["model_version"])
        self.keeper = EngineKeeper(lambda: Engine.load(weights, config))
        metrics = Metrics(pb_utils, {"model": args["model_name"], "version": args["model_version"]})
        self.replies = Replies(self.keeper.cancel, lambda: metrics.tell(self.keeper.stats))
        self.ids = itertools.count()
        if folder := os.environ.get(LOADED):
            (Path(folder) / args["model_name"]).touch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._begin(request, ResponseSender(request.get_response_sender()))

    def finalize(self) -> None:
        self.keeper.close()
        self.replies.close()

    def _begin(self, asked: Any, sender: ResponseSender) -> None:
        """Hand a request to the engine; whatever is wrong with it is an answer to it alone."""
        try:
            reply = self._submit(asked, sender)
        except ValueError as error:
            sender.fail("INVALID_ARG", str(error))
        except RefusedError as error:
            sender.fail("UNAVAILABLE", f"{error}; {AGAIN} {error.retry_after:.0f} s")
        else:
            self.replies.watch(reply)

    def _submit(self, asked: Any, sender: ResponseSender) -> Reply:
        engine = self.keeper.first
        parameters = json.loads(asked.parameters() or "{}")
        values = read_values(tensors_of(asked), parameters)
        prompt = self._prompt(values)
        sender.logprobs = values.get("return_logprobs", False)
        sender.prefix = "" if values.get("exclude_input_in_output", True) else values.get("text_input", "")
        microseconds = asked.timeout() or parameters.get("timeout", 0)  # generate leaves it among the parameters
        request = Request(
            id=str(next(self.ids)),
            prompt=prompt,
            sampling=sampling_of(values, engine.eos),
            priority=values.get("priority", 0),
            deadline=time.monotonic() + microseconds / 1e6 if microseconds else None,
            logprobs=0 if sender.logprobs else None,
        )
        reply = self.replies.make(request.id, sender, values.get("stream", False))
        self.keeper.submit(request, reply.deliver)
        return reply

    def _prompt(self, values: Mapping[str, Any]) -> list[int]:
        if ("text_input" in values) == ("input_ids" in values):
            raise ValueError("give the prompt as text_input, or as input_ids")
        if "input_ids" in values:
            return values["input_ids"]
        tokenizer: Any = self.keeper.first.tokenizer
        if tokenizer is None:
            raise ValueError("text_input needs a tokenizer, and the model's folder has none: give input_ids")
        return tokenizer.encode(values["text_input"]).ids


class ResponseSender:
    """One request's way back. One thread at a time uses it.

    Attributes:
        logprobs: whether they were asked for.
        prefix: what the first text begins with.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self.logprobs, self.prefix = False, ""

    def send(self, outputs: list[Output], last: bool) -> None:
        values = values_of(outputs, self.logprobs)
        values["text_output"][0], self.prefix = self.prefix + values["text_output"][0], ""
        tensors = [tensor_of(name, elements) for name, elements in values.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=_FINAL if last else 0)

    def fail(self, kind: str, why: str) -> None:
        error = pb_utils.TritonError(why, getattr(pb_utils.TritonError, kind))
        self._sender.send(pb_utils.InferenceResponse(error=error), flags=_FINAL)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def tensors_of(asked: Any) -> dict[str, Any]:
    """The inputs that a request has: one value, or a list of them.

    Raises:
        ValueError: a text that is not UTF-8, or another number of elements than one where one is wanted.
    """
    found: dict[str, Any] = {}
    for wanted in INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(asked, wanted.name)
        if tensor is None:
            continue
        elements = tensor.as_numpy().reshape(-1).tolist()
        try:
            values = [one.decode() if isinstance(one, bytes) else one for one in elements]
        except UnicodeDecodeError as error:
            raise ValueError(f"{wanted.name} is not UTF-8: {error}") from None
        if not wanted.many and len(values) != 1:
            raise ValueError(f"{wanted.name} has {len(values)} elements; it must have one")
        found[wanted.name] = values if wanted.many else values[0]
    return found


def tensor_of(name: str, elements: list[Any]) -> Any:
    kind = KINDS[name]
    plain = [one.encode() for one in elements] if kind == "STRING" else elements
    return pb_utils.Tensor(name, np.array(plain, dtype=DTYPES[kind]))
