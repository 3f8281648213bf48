"""Triton's backend `onnxruntime` where there is none: ONNX Runtime's own package in Python."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from weft.serve.triton.graph import Graph, Run


class TritonPythonModel(Graph):
    def load(self, version: Path) -> Run:
        graph = version / "model.onnx"
        graph = graph / graph.name if graph.is_dir() else graph  # a folder where weights lie apart
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return lambda given: session.run(self.outputs, given)
