"""Batch invariance: the same bits, whoever else is there."""

from __future__ import annotations

import pytest
import torch

from weft.models.decoder import Decoder
from weft.models.shape import Experts, Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling

SIZES = {"num_layers": 2, "hidden": 64, "num_heads": 4, "ffn": 96, "vocab": 97, "max_seq": 128, "init_std": 0.3}
SHAPES = {
    "llama": Shape(**SIZES, num_kv_heads=2),
    "mixtral": Shape(family="mixtral", **SIZES, num_kv_heads=2, experts=Experts(num_experts=4, per_token=2, ffn=32)),
}
SETTINGS = {"max_sequences": 6, "step_tokens": 24, "block_tokens": 4}


def told(engine: Engine, prompt: list[int], crowd: int) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of a request among others, some of which came before it and some of which follow."""
    numbers = torch.Generator().manual_seed(crowd)
    for index in range(crowd):
        length = int(torch.randint(3, 40, (1,), generator=numbers))
        other = prompt[: length // 2] + torch.randint(97, (length,), generator=numbers).tolist()
        engine.add(Request(str(index), other, Sampling(0.8, max_tokens=int(length))))
    for _ in range(crowd):
        engine.step()
    engine.add(Request("me", prompt, Sampling(0.8, seed=1, max_tokens=30), logprobs=0, priority=int(crowd % 2)))
    found: list[tuple[int, float]] = []
    while engine.busy:
        for output in engine.step():
            if output.id == "me":
                found += [(one.token, one.logprob) for one in output.logprobs or ()]
    return found


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_neighbours(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Decoder(SHAPES[family]).to(dtype)
    prompt = torch.randint(97, (27,), generator=torch.Generator().manual_seed(9)).tolist()
    alone = told(Engine(model, None, EngineConfig(**SETTINGS, invariant=True)), prompt, 0)
    assert len(alone) == 30
    engine = Engine(model, None, EngineConfig(**SETTINGS, invariant=True, cache_tokens=132))
    for crowd in (1, 4, 7, 0):
        assert told(engine, prompt, crowd) == alone, f"among {crowd} others"
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0


def test_settings_that_cannot_be_invariant_are_refused() -> None:
    with pytest.raises(ValueError, match="invariant: speculation computes several tokens at once"):
        EngineConfig(invariant=True, draft_tokens=2)
    with pytest.raises(ValueError, match="a stride of 16 tokens of a prompt"):
        EngineConfig(invariant=True, max_sequences=30, step_tokens=32)
    assert EngineConfig(invariant=True).stride == 256
