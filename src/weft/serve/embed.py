"""A text as one vector: the mean of a decoder's last hidden states."""

from __future__ import annotations

import torch

from weft.serve.engine import Engine
from weft.serve.requests.request import NumbersError


@torch.inference_mode()
def embed(engine: Engine, prompt: list[int], adapter: str | None = None) -> list[float]:
    """Hidden states behind the last norm, [T, D], their mean over T, at length 1.

    On the engine's own thread: it computes the whole prompt at once, and nothing else meanwhile.

    Args:
        adapter: of `EngineConfig.adapters`; None: the model as it is.

    Raises:
        NumbersError: the model's are not finite.
    """
    mean = engine.runner.embed(prompt, [None, *engine.config.adapters].index(adapter))
    vector = torch.nn.functional.normalize(mean, dim=0)
    if not bool(vector.isfinite().all()):
        raise NumbersError("the model's hidden states are not finite numbers")
    return vector.tolist()
