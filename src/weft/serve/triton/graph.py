"""A graph in Triton's Python backend, where Triton has no backend for it: tensors in, tensors out, a request at a time.

The Triton that pip brings has no backend but Python's. It takes a folder with a `model.py` for a backend too, of all models
that name it; `home.py` makes those that point to `onnx.py` and `aoti.py`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from weft.serve.triton.repository import say_loaded

Run = Callable[[dict[str, Any]], Sequence[Any]]
"""From inputs by name to the outputs, in the order of the config."""


class Graph(ABC):
    """The names and arguments of its public methods are Triton's."""

    @abstractmethod
    def load(self, version: Path) -> Run:
        """The graph of a version's folder."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs, self.outputs = ([one["name"] for one in config[side]] for side in ("input", "output"))
        self.run = self.load(Path(args["model_repository"]) / args["model_version"])
        say_loaded(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """What goes wrong in one request is its own answer."""
        try:
            found = self.run(
                {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            )
        except Exception as error:  # noqa: BLE001 (a library's errors are an open set)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(name, values) for name, values in zip(self.outputs, found, strict=True)]
        return pb_utils.InferenceResponse(tensors)
