"""Triton's backend `onnxruntime` where there is none: a graph, run by ONNX Runtime's own package in Python.

The Triton that pip brings has no backend but Python's. It takes a folder with a `model.py` for a backend too, of all models
that name it; `home.py` makes one that points here. Requests of a batch are run one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The names and arguments of all methods are Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs, self.outputs = ([one["name"] for one in config[side]] for side in ("input", "output"))
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        graph = graph / graph.name if graph.is_dir() else graph  # a folder where weights lie apart
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """What goes wrong in one request is its own answer."""
        try:
            given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            found = self.session.run(self.outputs, given)
        except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors are an open set)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(name, values) for name, values in zip(self.outputs, found, strict=True)]
        return pb_utils.InferenceResponse(tensors)
