"""What the cache keeps in 8 bits, how far it is off, and how much more has room."""

from __future__ import annotations

import pytest
import torch
from test_engine import families, models, outputs_of, random_prompts

from weft.models.shape import Family
from weft.presets import preset_shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps.cache import token_bytes
from weft.serve.steps.runner import num_blocks
from weft.serve.steps.store import Int8Store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(16,), (12, 4)])
def test_vectors_come_back_to_half_a_step(parts: tuple[int, ...], dtype: torch.dtype) -> None:
    store = Int8Store(3, 4, 2, parts, torch.empty(0, dtype=dtype))
    numbers = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 2, 16, generator=numbers) * torch.logspace(-6, 3, 5)[:, None, None]).to(dtype)
    x[4] = 0
    x[..., 12:] *= 1000 if len(parts) > 1 else 1  # what one scale for both would leave nothing of the first part of
    store.put(torch.tensor([8, 9, 0, 1, 2]), x)
    found = store.take(torch.tensor([[2, 0], [3, 3]]))
    assert found.shape == (2, 2, 8, 16)
    assert found.dtype == dtype
    assert found[1].count_nonzero() == 0
    kept = found[0].transpose(0, 1)[[0, 1, 4, 5, 6]].double()
    largest = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.double().split(parts, dim=-1)]
    step = torch.cat(largest, dim=-1) / 127
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


def test_of_latent_attention_one_vector_a_token_is_kept() -> None:
    """Whatever the heads: 20 numbers here, where keys and values of 4 heads were 4 · (12 + 10) = 88."""
    _, model = models("deepseek_v3", 0)
    for kind, size in (
        ("auto", 20 * 4),
        ("int8", 20 + 2 * 4),
    ):  # int8: a scale for the vector, and one for the turned part
        config = EngineConfig(cache_bytes=1 << 16, cache_dtype=kind)
        assert token_bytes(model.shape, config, torch.float32) == size
        assert num_blocks(model, config, 64) == (1 << 16) // (16 * 2 * size)
        vectors = Engine(model, None, config).runner.cache.layers[0].vectors
        held = [vectors.rows] if kind == "auto" else [vectors.codes.rows, vectors.scales.rows]
        assert sum(rows[0].nbytes for rows in held) == 16 * size


@pytest.mark.parametrize(("name", "before", "after"), [("deepseek-v2-lite", 10240, 1152), ("deepseek-v3", 81920, 1152)])
def test_what_a_token_of_deepseek_takes(name: str, before: int, after: int) -> None:
    """Bytes in bf16, a layer: keys and values of all heads, and the vector that they are made of."""
    shape = preset_shape(name)
    heads = 2 * shape.num_heads * (shape.head_dim + shape.value_dim)
    assert (heads, token_bytes(shape, EngineConfig(), torch.bfloat16)) == (before, after)
    assert token_bytes(shape, EngineConfig(tp=8), torch.bfloat16) == after
    assert token_bytes(shape, EngineConfig(cache_dtype="int8"), torch.bfloat16) == 512 + 64 + 2 * 4


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_dtype is fp8; it must be auto or int8"):
        EngineConfig(cache_dtype="fp8")
