"""Several tokens of each sequence in one step say what one at a time says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from test_decoding import SIZES, in_fixed_sizes  # noqa: F401  (a fixture)
from test_engine import families, models, outputs_of, random_prompts

from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps.ahead import TOKENS

Make = Callable[..., Engine]
PROMPTS = random_prompts(5, 30, 2, 9, 1, 17)
LENGTHS = [3 + 5 * number for number in range(len(PROMPTS))]


def texts(engine: Engine, each: Callable[[int], Sampling]) -> dict[str, tuple[list[int], str | None]]:
    """The tokens of each text, and why it ended."""
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, each(number)))
    found = {}
    for key, outputs in outputs_of(engine).items():
        found[str(key)] = ([token for output in outputs for token in output.tokens], outputs[-1].finish)
    assert engine.blocks.num_free == engine.blocks.count
    return found


def greedy(number: int) -> Sampling:
    return Sampling(max_tokens=LENGTHS[number])


def drawn(number: int) -> Sampling:
    return Sampling(max_tokens=LENGTHS[number], temperature=0.8, top_p=0.9, top_k=20, seed=number)


@families
@pytest.mark.parametrize("each", [greedy, drawn])
@pytest.mark.parametrize("more", [{}, {"cache_tokens": 120}, {"cache_dtype": "int8"}])
def test_texts_are_those_of_single_steps(
    family: Family,
    each: Callable[[int], Sampling],
    more: dict,
    in_fixed_sizes: Make,  # noqa: F811
) -> None:
    plain = Engine(copy.deepcopy(models(family, 0)[1]), None, EngineConfig(**SIZES, **more))
    ahead = in_fixed_sizes(family, **more)
    assert texts(ahead, each) == texts(plain, each)
    fewer = sum(LENGTHS) / len(LENGTHS) / 2 if "cache_tokens" not in more else 0
    assert ahead.stats().steps < plain.stats().steps - fewer
    assert ahead.stats().drafted == 0, "they are not speculation's"


def test_a_text_ends_inside(in_fixed_sizes: Make) -> None:  # noqa: F811
    plain = texts(Engine(copy.deepcopy(models("llama", 0)[1]), None, EngineConfig(**SIZES)), greedy)
    stops = {tokens[len(tokens) // 2] for tokens, _ in plain.values()}

    def stopped(number: int) -> Sampling:
        return Sampling(max_tokens=LENGTHS[number], stop_ids=tuple(stops))

    expected = {}
    for key, (tokens, _) in plain.items():
        first = next((at for at, token in enumerate(tokens) if token in stops), None)
        expected[key] = (tokens, "length") if first is None else (tokens[: first + 1], "stop")
    assert texts(in_fixed_sizes("llama"), stopped) == expected


@pytest.mark.parametrize(
    "other", [{"presence_penalty": 1.0}, {"bias": {3: 2.0}}, {"min_tokens": 20, "stop_ids": (3,)}], ids=str
)
def test_one_that_the_cpu_has_a_say_in_keeps_all_from_it(in_fixed_sizes: Make, other: dict) -> None:  # noqa: F811
    def mixed(number: int) -> Sampling:
        return Sampling(max_tokens=40, **other) if number == 0 else greedy(number)

    plain = texts(Engine(copy.deepcopy(models("llama", 0)[1]), None, EngineConfig(**SIZES)), mixed)
    engine = in_fixed_sizes("llama")
    assert texts(engine, mixed) == plain


def test_a_request_that_comes_meanwhile_is_let_in_next(in_fixed_sizes: Make) -> None:  # noqa: F811
    engine = in_fixed_sizes("llama")
    engine.add(Request("long", PROMPTS[0], Sampling(max_tokens=40)))
    engine.step()
    assert [len(output.tokens) for output in engine.step()] == [TOKENS]
    engine.add(Request("other", PROMPTS[1], Sampling(max_tokens=40)))
    assert {output.id: len(output.tokens) for output in engine.step()} == {"long": 1, "other": 1}
    assert {output.id: len(output.tokens) for output in engine.step()} == {"long": TOKENS, "other": TOKENS}


def test_a_step_is_timed_as_the_passes_it_has(in_fixed_sizes: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What others' prompts may take is measured by it: four passes of a token are no pass of four."""
    engine = in_fixed_sizes("llama")
    timed: list[int] = []
    monkeypatch.setattr(engine.scheduler.courtesy.times, "took", lambda tokens, seconds: timed.append(tokens))
    engine.add(Request("a", PROMPTS[0], Sampling(max_tokens=1 + 2 * TOKENS)))
    while engine.busy:
        engine.step()
    assert timed == [len(PROMPTS[0]), 1, 1]


def test_one_that_is_cancelled_gives_its_blocks_back(in_fixed_sizes: Make) -> None:  # noqa: F811
    engine = in_fixed_sizes("llama")
    engine.add(Request("a", PROMPTS[0], Sampling(max_tokens=40)))
    engine.step()
    engine.step()
    engine.cancel("a")
    assert [output.finish for output in engine.step()] == ["cancelled"]
    assert engine.blocks.num_free == engine.blocks.count
