"""A text as one vector: the mean of a decoder's last hidden states."""

from __future__ import annotations

import torch

from weft.serve.engine import Engine


@torch.inference_mode()
def embed(engine: Engine, prompt: list[int], adapter: str | None = None) -> list[float]:
    """Hidden states behind the last norm, [T, D], their mean over T, at length 1.

    On the engine's own thread: it computes the whole prompt at once, and nothing else meanwhile.

    Args:
        adapter: of `EngineConfig.adapters`; None: the model as it is.

    Raises:
        ValueError: the model is cut over several processes, or its numbers are not finite.
    """
    if engine.ranks is not None:
        raise ValueError("embeddings of a model that is cut over several processes cannot be computed")
    model = engine.runner.model
    assert model.norm is not None
    engine.runner.adapters.use([None, *engine.config.adapters].index(adapter))
    hidden = model.norm(model.body(torch.tensor([prompt], device=engine.runner.device)))[0].float()
    vector = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
    if not bool(vector.isfinite().all()):
        raise ValueError("the model's hidden states are not finite numbers")
    return vector.tolist()
