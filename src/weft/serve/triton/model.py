"""Triton's Python backend, run by weft's engine: many requests at once, each answered as its tokens come.

A repository's `1/model.py` takes `TritonPythonModel` from here. Triton runs it in a process of its own, the stub, which
calls `initialize` once, `execute` for requests that came, and `finalize`. `execute` hands them to the engine and returns;
so the engine, not Triton, makes the batch.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from weft.serve.engine import Engine
from weft.serve.requests.forms import HELPERS, Kind, form_of
from weft.serve.requests.request import Output, RefusedError, Request
from weft.serve.triton.keeper import EngineKeeper
from weft.serve.triton.metrics import Metrics
from weft.serve.triton.replies import Replies, Reply, values_of
from weft.serve.triton.repository import say_loaded
from weft.serve.triton.settings import read_settings
from weft.serve.triton.tensors import AGAIN, INPUTS, OUTPUTS, prompt_of, read_values, sampling_of

DTYPES = {"STRING": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
KINDS = {tensor.name: tensor.kind for tensor in OUTPUTS}


class TritonPythonModel:
    """The names and arguments of all methods are Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        weights, config = read_settings(Path(args["model_repository"]) / args["model_version"])
        self.keeper = EngineKeeper(lambda: Engine.load(weights, config))
        metrics = Metrics(pb_utils, {"model": args["model_name"], "version": args["model_version"]})
        self.replies = Replies(self.keeper.cancel, lambda: metrics.tell(self.keeper.stats))
        self.ids = itertools.count()
        # more than there are helpers: a slow form gives way only to one that waits
        self.compiling = ThreadPoolExecutor(4 * HELPERS, thread_name_prefix="weft-forms")
        self.may_compile = BoundedSemaphore(config.max_waiting or 1)
        say_loaded(args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = ResponseSender(request.get_response_sender())
            with sender.telling():
                self._begin(request, sender)

    def finalize(self) -> None:
        self.compiling.shutdown(cancel_futures=True)
        self.keeper.close()
        self.replies.close()

    def _begin(self, asked: Any, sender: ResponseSender) -> None:
        """Hand a request to the engine; whatever is wrong with it is an answer to it alone.

        Raises:
            ValueError, RefusedError: as the engine; or the request makes no sense.
        """
        engine = self.keeper.first
        parameters = json.loads(asked.parameters() or "{}")
        values = read_values(tensors_of(asked), parameters)
        prompt = prompt_of(values, engine.tokenizer)
        sender.logprobs = values.get("return_logprobs", False)
        sender.prefix = "" if values.get("exclude_input_in_output", True) else values.get("text_input", "")
        microseconds = asked.timeout() or parameters.get("timeout", 0)  # generate leaves it among the parameters
        request = Request(
            id=str(next(self.ids)),
            prompt=prompt,
            sampling=sampling_of(values, engine.eos),
            n=values.get("n", 1),
            priority=values.get("priority", 0),
            deadline=time.monotonic() + microseconds / 1e6 if microseconds else None,
            adapter=values.get("lora_name"),
            logprobs=0 if sender.logprobs else None,
            prompt_logprobs=0 if values.get("return_prompt_logprobs") else None,
        )
        engine.check(request)
        sender.ends = [None] * request.n
        reply = self.replies.make(request.id, sender, values.get("stream", False), request.n)
        form = form_of(values)
        if form is None:
            self._submit(request, reply)
        elif self.may_compile.acquire(blocking=False):
            self.compiling.submit(self._compile, request, reply, sender, *form)
        else:
            raise RefusedError("too many requests wait until the form of their text is compiled", retry_after=5.0)

    def _compile(self, request: Request, reply: Reply, sender: ResponseSender, kind: Kind, source: str) -> None:
        """On a thread of its own, for that can take seconds in which others are served."""
        try:
            with sender.telling():
                grammar = self.keeper.first.grammars.compile(kind, source)
                self._submit(replace(request, grammar=grammar), reply)
        except Exception as error:  # noqa: BLE001 (whatever it is, its client must not wait for ever)
            print(f"weft: the {kind} could not be compiled: {error!r}", file=sys.stderr, flush=True)
            sender.fail("INTERNAL", f"the {kind} could not be compiled")
        finally:
            self.may_compile.release()

    def _submit(self, request: Request, reply: Reply) -> None:
        self.keeper.submit(request, reply.deliver)
        self.replies.watch(reply)


class ResponseSender:
    """One request's way back. One thread at a time uses it.

    Attributes:
        logprobs: whether they were asked for.
        prefix: what the first texts begin with.
        ends: as `values_of` keeps them.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self.logprobs, self.prefix = False, ""
        self.ends: list[str | None] = [None]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Why a request is not begun is its answer."""
        try:
            yield
        except ValueError as error:
            self.fail("INVALID_ARG", str(error))
        except RefusedError as error:
            self.fail("UNAVAILABLE", f"{error}; {AGAIN} {error.retry_after:.0f} s")

    def send(self, outputs: list[Output], last: bool) -> None:
        values = values_of(outputs, self.logprobs, self.ends)
        values["text_output"] = [self.prefix + text for text in values["text_output"]]
        self.prefix = ""
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
