"""Speculation changes how many steps a text takes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling
from weft.serve.requests.sequence import Sequence
from weft.serve.steps.speculate import LookupDrafter

SIZES = {"hidden": 32, "num_heads": 2, "ffn": 64, "vocab": 31, "max_seq": 160, "init_std": 0.3}
TIGHT = {"max_sequences": 3, "step_tokens": 18, "block_tokens": 4, "cache_tokens": 160}


def decoder(seed: int, num_layers: int, **over: object) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(Shape(family="llama", num_layers=num_layers, **{**SIZES, **over}))


def texts(engine: Engine) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of greedy and sampled requests, one of which repeats itself."""
    kinds = {
        "greedy": Sampling(max_tokens=50), "penalized": Sampling(max_tokens=50, repetition_penalty=1.3),
        "sampled": Sampling(0.7, seed=1, max_tokens=50), "filtered": Sampling(1.0, 4, 0.9, seed=2, max_tokens=50),
        "ended": Sampling(0.7, seed=3, max_tokens=50, eos=(7, 8), min_tokens=5),
    }  # fmt: skip
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in kinds}
    for name, sampling in kinds.items():
        engine.add(Request(name, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3], sampling, logprobs=0))
    while engine.busy:
        for output in engine.step():
            found[output.id][0].extend(output.tokens)
            found[output.id][1].extend(one.logprob for one in output.logprobs or ())
    return found


@pytest.mark.parametrize("draft", ["lookup", "other model", "the model itself"])
def test_texts_are_those_of_plain_decoding(draft: str) -> None:
    model = decoder(0, 2)
    small = {"lookup": None, "other model": decoder(1, 1), "the model itself": model}[draft]
    plain = Engine(model, None, EngineConfig(**TIGHT))
    expected = texts(plain)
    for settings in ({}, TIGHT):
        engine = Engine(model, None, EngineConfig(**settings, draft_tokens=4), draft=small)
        for _ in range(1 + bool(settings)):
            found = texts(engine)
            assert {name: tokens for name, (tokens, _) in found.items()} == {
                name: tokens for name, (tokens, _) in expected.items()
            }
            for name, (_, logprobs) in found.items():
                assert logprobs == pytest.approx(expected[name][1], abs=1e-4)
        stats = engine.stats()
        assert stats.drafted > 0
        assert engine.blocks.num_free == engine.blocks.count
        if draft == "the model itself":
            assert stats.accepted > 0.1 * stats.drafted, "greedy guesses, of what is mostly sampled"


def test_a_model_that_guesses_itself_is_right_every_time() -> None:
    model = decoder(0, 2)
    engine = Engine(model, None, EngineConfig(draft_tokens=4), draft=model)
    engine.add(Request("a", [1, 2, 3], Sampling(max_tokens=51)))
    while engine.busy:
        engine.step()
    stats = engine.stats()
    assert stats.accepted == stats.drafted == 40
    assert stats.steps == 11


def test_lookup_guesses_what_followed_the_last_time() -> None:
    completion = Sequence(Request("", [1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2]), 0, 99)
    drafter = LookupDrafter()
    for token, expected in [(None, []), (3, [8, 7, 1]), (8, [7, 1, 2]), (5, [])]:
        completion.tokens += [token] if token is not None else []
        drafter.begin(completion, 3)
        assert completion.draft == expected


def test_draft_models_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="the draft model's vocabulary is 30, the model's 31"):
        Engine(decoder(0, 1), None, EngineConfig(draft_tokens=2), draft=decoder(0, 1, vocab=30))
    with pytest.raises(ValueError, match=r"draft_tokens ahead, which is 0: set it \(--draft-tokens\)"):
        Engine(decoder(0, 1), draft=decoder(0, 1))
