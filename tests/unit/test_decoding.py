"""Steps in fixed sizes, which a GPU records as CUDA graphs, say what plain steps say. Here they just run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_engine import SHAPES, families, models, outputs_of, random_prompts

from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps import compiled
from weft.serve.steps.batch import Batch
from weft.serve.steps.decoding import size_above

SIZES = {"max_sequences": 6, "step_tokens": 32, "block_tokens": 4}


@pytest.fixture
def in_fixed_sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine whose decoding steps are static, with nothing compiled."""
    monkeypatch.setattr(compiled, "compile_step", lambda model, layers: layers)

    def make(family: Family, **more: object) -> Engine:
        config = EngineConfig(**SIZES, **more, compile=True)  # type: ignore[arg-type]
        engine = Engine(copy.deepcopy(models(family, 0)[1]), None, config)
        engine.runner.decoding = engine.runner.in_fixed_sizes(config)
        return engine

    return make


def told(engine: Engine, prompts: list[list[int]]) -> dict[str, list[tuple[int, float]]]:
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, Sampling(max_tokens=3 + 5 * number), logprobs=0))
    return {
        str(key): [(one.token, one.logprob) for output in outputs for one in output.logprobs or ()]
        for key, outputs in outputs_of(engine).items()
    }


@families
@pytest.mark.parametrize("more", [{}, {"cache_tokens": 120}, {"cache_dtype": "int8"}])
def test_texts_and_log_probabilities_are_those_of_plain_steps(
    family: Family, more: dict, in_fixed_sizes: Callable[..., Engine]
) -> None:
    prompts = random_prompts(5, 30, 2, 9, 1, 17)
    plain = Engine(copy.deepcopy(models(family, 0)[1]), None, EngineConfig(**SIZES, **more))
    static = in_fixed_sizes(family, **more)
    expected, found = told(plain, prompts), told(static, prompts)
    assert static.runner.decoding is not None
    assert len(static.runner.decoding.steps) >= 3, "of 1, 2, 4 sequences at least"
    assert expected.keys() == found.keys()
    for key, tokens in expected.items():
        assert [token for token, _ in found[key]] == [token for token, _ in tokens]
        bound = 0.05 if "cache_dtype" in more else 2e-4
        assert [logprob for _, logprob in found[key]] == pytest.approx([logprob for _, logprob in tokens], abs=bound)
    assert static.blocks.num_free == static.blocks.count


def test_padding_writes_nowhere_else(in_fixed_sizes: Callable[..., Engine]) -> None:
    engine = in_fixed_sizes("llama")
    decoding, cache, block = engine.runner.decoding, engine.runner.cache, engine.blocks.size
    assert decoding is not None
    assert engine.runner.scratch == engine.blocks.count, "no sequence gets it"
    three = Batch(
        torch.tensor([5, 6, 7]), torch.tensor([0, 4, 9]), torch.tensor([0, 1, 2 * block + 9 % block]), [1, 1, 1],
        [1, 5, 10], [[0], [4, 0], [5, 6, 2]], [0, 0, 0], torch.arange(3),
    )  # fmt: skip
    assert decoding.takes(three)
    with torch.inference_mode():
        hidden = decoding(three, three.tokens[None])
    assert hidden.shape == (1, 3, SHAPES["llama"].hidden)
    assert list(decoding.steps) == [(4, 8)]
    for layer in cache.layers:
        for store in (layer.keys, layer.values):  # type: ignore[union-attr]
            written = store.rows.flatten(0, 1).flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
            assert written == [0, 1, 2 * block + 9 % block, engine.runner.scratch * block]


def test_what_else_is_no_step_of_this_kind(in_fixed_sizes: Callable[..., Engine]) -> None:
    decoding = in_fixed_sizes("llama").runner.decoding
    assert decoding is not None
    prompt = Batch(torch.arange(3), torch.arange(3), torch.arange(3), [3], [3], [[0]], [0], torch.tensor([2]))
    assert not decoding.takes(prompt)
    assert not decoding.takes(Batch(*3 * [torch.arange(1)], [1], [1], [[0]], [0], torch.arange(0)))


def test_sizes_are_few() -> None:
    assert [size_above(count, 1, 6) for count in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 4, 6, 6]
    assert [size_above(count, 8, 100) for count in (1, 8, 9, 64, 65, 100)] == [8, 8, 16, 64, 100, 100]
