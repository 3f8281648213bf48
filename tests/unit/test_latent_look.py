"""Latent attention over a cache of vectors: both ways to look at them, and the engine's texts by them."""

from __future__ import annotations

import pytest
import torch
from test_engine import models, outputs_of, random_prompts, run

from weft.models.decoder import Decoder
from weft.models.latent import LatentAttention
from weft.models.shape import Latent, Shape
from weft.presets import preset_shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling

SIZES = {"q_rank": 12, "kv_rank": 20, "nope_dim": 6, "rope_dim": 4, "value_dim": 8}


@pytest.mark.parametrize(("batch", "new", "seen"), [(3, 1, 9), (1, 5, 9), (1, 40, 41)])
@pytest.mark.parametrize("other", [False, True])
def test_both_ways_see_the_same(batch: int, new: int, seen: int, other: bool) -> None:
    shape = Shape(family="deepseek_v3", num_layers=1, hidden=16, num_heads=3, ffn=8, vocab=9, max_seq=9, latent=SIZES)
    torch.manual_seed(0)
    attention = LatentAttention(shape).double()
    q = torch.randn(batch, 3, new, 10, dtype=torch.double)
    latents = torch.randn(batch, 1, seen, 24, dtype=torch.double)
    mask = torch.zeros(batch, 1, new, seen, dtype=torch.double)
    mask.masked_fill_(torch.rand(mask.shape) < 0.4, float("-inf"))[..., 0] = 0
    up = torch.randn_like(attention.kv.weight) if other else None
    found = {}
    for makes_keys in (False, True):
        attention.makes_keys = lambda new, seen, answer=makes_keys: answer  # type: ignore[method-assign]
        found[makes_keys] = attention.look(q, latents, mask, up)
    assert found[True].shape == (batch, 3, new, 8)
    torch.testing.assert_close(found[True], found[False], rtol=1e-12, atol=1e-12)


def test_the_way_of_less_work_is_taken() -> None:
    """Of DeepSeek's published sizes: one token, or a few guesses, look at vectors; a prompt's part has keys made for it."""
    shape = preset_shape("deepseek-v2-lite")
    with torch.device("meta"):
        attention = LatentAttention(shape)
    assert [attention.makes_keys(new, 4096) for new in (1, 5, 160, 170, 512)] == [False, False, False, True, True]


def test_a_decoding_step_makes_no_keys() -> None:
    """The matrix of keys and values is applied to prompts alone."""
    _, model = models("deepseek_v3", 0)
    shapes: list[torch.Size] = []
    handles = [
        block.attention.kv.register_forward_hook(lambda module, inputs, made: shapes.append(made.shape))
        for block in model.blocks.values()
    ]
    run(Engine(model, None, EngineConfig()), random_prompts(0, 12, 7), Sampling(max_tokens=10))
    for handle in handles:
        handle.remove()
    assert shapes == 2 * [(1, 7, 72), (1, 12, 72)] or shapes == 2 * [(1, 12, 72), (1, 7, 72)]


@pytest.mark.parametrize("seed", [0, 1])
def test_speculation_over_vectors_changes_no_text(seed: int) -> None:
    """Guessed by the model itself, and by another that is mostly wrong."""
    model, draft = models("deepseek_v3", 0)[1], models("deepseek_v3", seed)[1]
    prompts = random_prompts(4, 18, 5)
    plain = run(Engine(model, None, EngineConfig()), prompts, Sampling(max_tokens=30))
    engine = Engine(model, None, EngineConfig(draft_tokens=3, block_tokens=4), draft=draft)
    assert run(engine, prompts, Sampling(max_tokens=30)) == plain
    stats = engine.stats()
    assert stats.drafted > 0
    assert (stats.accepted == stats.drafted) == (seed == 0)
    assert engine.blocks.num_free == engine.blocks.count


def test_texts_without_neighbours_are_the_same_bits() -> None:
    torch.manual_seed(0)
    shape = Shape(
        family="deepseek_v3", num_layers=2, hidden=48, num_heads=4, ffn=96, vocab=97, max_seq=64, init_std=0.3,
        latent=Latent(**SIZES),
    )  # fmt: skip
    model, [prompt, *others] = Decoder(shape), random_prompts(2, 21, 9, 30)
    told = []
    for crowd in ([], others):
        engine = Engine(model, None, EngineConfig(max_sequences=4, step_tokens=16, block_tokens=4, invariant=True))
        for number, text in enumerate(crowd):
            engine.add(Request(str(number), text, Sampling(max_tokens=20)))
        found = outputs_of(engine, Request("me", prompt, Sampling(max_tokens=20), logprobs=0))
        told.append([(one.token, one.logprob) for output in found["me", 0] for one in output.logprobs or ()])
    assert told[0] == told[1]
