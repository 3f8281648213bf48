"""Triton's platform `torch_aoti` where there is none: PyTorch's own loader of the libraries that AOTInductor compiled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._inductor import aoti_load_package

from weft.serve.triton.graph import Graph, Run
from weft.serve.triton.repository import PACKAGE


class TritonPythonModel(Graph):
    def load(self, version: Path) -> Run:
        library = aoti_load_package(str(version / PACKAGE))
        return lambda given: [library(*map(torch.from_numpy, given.values())).numpy()]
