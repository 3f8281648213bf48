"""Triton's platform `torch_aoti` where there is none: PyTorch's own loader of the libraries that AOTInductor compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_load_package

from weft.serve.triton.graph import Graph, Run
from weft.serve.triton.repository import CONTEXT, PACKAGE


class TritonPythonModel(Graph):
    def load(self, version: Path, config: Mapping[str, Any]) -> Run:
        """A library believes what it is given, and what is beyond a table is memory that is not its own: so sizes and
        token ids are looked at here."""
        library = aoti_load_package(str(version / PACKAGE))
        vocab = int(config["output"][0]["dims"][-1])
        context = int(config["parameters"][CONTEXT]["string_value"])

        def run(given: dict[str, Any]) -> list[Any]:
            [tokens] = given.values()
            if not (tokens.size and tokens.shape[1] <= context):
                raise ValueError(
                    f"the shape is {list(tokens.shape)}; it must be [texts, tokens], of 1 to {context} tokens"
                )
            if not 0 <= tokens.min() <= tokens.max() < vocab:
                raise ValueError(f"a token is outside the model's vocabulary of {vocab}")
            return [library(torch.from_numpy(tokens)).numpy()]

        return run
