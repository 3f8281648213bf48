"""What the cache keeps in 8 bits, how far it is off, and how much more has room."""

from __future__ import annotations

import pytest
import torch
from test_engine import families, models, outputs_of, random_prompts

from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.request import Request, Sampling
from weft.serve.runner import num_blocks
from weft.serve.store import Int8Store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_come_back_to_half_a_step(dtype: torch.dtype) -> None:
    store = Int8Store(3, 4, 2, 16, torch.empty(0, dtype=dtype))
    numbers = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 2, 16, generator=numbers) * torch.logspace(-6, 3, 5)[:, None, None]).to(dtype)
    x[4] = 0
    store.put(torch.tensor([8, 9, 0, 1, 2]), x)
    found = store.take(torch.tensor([[2, 0], [3, 3]]))
    assert found.shape == (2, 2, 8, 16)
    assert found.dtype == dtype
    assert found[1].count_nonzero() == 0
    kept = found[0].transpose(0, 1)[[0, 1, 4, 5, 6]].double()
    step = x.double().abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * x.double().abs()
    assert ((kept - x.double()).abs() <= step * (0.5 + 1e-5) + rounding).all()
    assert torch.equal(store.take(range(2, 3))[0], found[0][:, :4])


@families
def test_a_cache_of_8_bits_says_nearly_the_same(family: Family) -> None:
    _, model = models(family, 0)
    told = {}
    for kind in ("auto", "int8"):
        engine = Engine(model, None, EngineConfig(step_tokens=8, max_sequences=4, block_tokens=4, cache_dtype=kind))
        for number, prompt in enumerate(random_prompts(3, 50, 33, 50)):
            engine.add(Request(str(number), prompt, Sampling(max_tokens=1), prompt_logprobs=0))
        outputs = outputs_of(engine)
        told[kind] = torch.tensor(
            [one.logprob for key in sorted(outputs) for one in outputs[key][0].prompt_logprobs or () if one is not None]
        )
    off = (told["auto"] - told["int8"]).abs()
    assert len(off) == 130
    assert 0 < off.median() < 0.02 * told["auto"].std()
    assert off.mean() < 0.1 * told["auto"].std(), "a router may choose another expert, but not often"


def test_8_bits_have_room_for_more() -> None:
    _, model = models("llama", 0)
    few, many = (
        num_blocks(model, EngineConfig(cache_bytes=1 << 16, cache_dtype=kind), 64) for kind in ("auto", "int8")
    )
    assert many == (1 << 16) // (16 * 2 * 2 * 2 * (12 + 4))  # block · layers · heads · (keys, values) · bytes
    assert few == (1 << 16) // (16 * 2 * 2 * 2 * 12 * 4)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_dtype is fp8; it must be auto or int8"):
        EngineConfig(cache_dtype="fp8")
