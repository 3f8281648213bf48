"""Sampling: the filters against transformers' warpers, and the frequencies of what is drawn."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weft.serve.requests.request import COLD, Request, Sampling
from weft.serve.requests.sequence import Sequence, random_stream
from weft.serve.steps.sampler import adjust, choose, draw, logprobs_of, warp


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("grid", [0.0, 0.5])  # logits on a grid are tied
def test_warp_is_what_transformers_does(
    temperature: float, top_k: int | None, top_p: float, grid: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "sort", partial(torch.sort, stable=True)
    )  # which of equal ones go is else anybody's guess
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits = (logits / grid).round() * grid if grid else logits
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(warp(logits, [Sampling(temperature, top_k, top_p)] * 6), expected, rtol=0, atol=0)


def test_temperature_0_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    assert chosen(logits, Sampling(), Sampling()) == [1, 0]
    assert chosen(logits, Sampling(temperature=1.0, top_k=1), Sampling(temperature=9.0, top_k=1)) == [1, 0]


def chosen(logits: torch.Tensor, *settings_: Sampling, text: tuple[int, ...] = (0,), num_prompt: int = 1) -> list[int]:
    rows = completions(*settings_, text=text, num_prompt=num_prompt)
    return choose(logits, rows, [row.tokens for row in rows])


def completions(*settings_: Sampling, text: tuple[int, ...] = (0,), num_prompt: int = 1) -> list[Sequence]:
    rows = [Sequence(Request("", text[:num_prompt], sampling), 0, 99) for sampling in settings_]
    for row in rows:
        row.tokens = list(text)
    return rows


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6, 1e-5, 100.0])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_whatever_is_allowed_chooses_a_token(temperature: float, penalty: float) -> None:
    logits = torch.tensor([[0.0, -50.0, 50.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for more in ({}, {"top_p": 1e-300}, {"top_k": 1}, {"min_p": 1.0}, {"bias": {2: -100, 0: 100}}):
        asked = Sampling(
            temperature, repetition_penalty=penalty, frequency_penalty=2, presence_penalty=-2, seed=1, **more
        )
        early = Sampling(temperature, repetition_penalty=penalty, min_tokens=9, eos=(0, 1, 3), **more)
        tokens = chosen(logits, asked, early, text=(0, 1, 2, 3, 2), num_prompt=4)
        assert all(0 <= token < 4 for token in tokens)
        assert tokens[1] == 2
        if temperature < COLD and not more and penalty == 1:
            assert tokens[0] == chosen(logits, Sampling(0), Sampling(0))[0]


def test_every_row_has_its_own_settings() -> None:
    """Rows with all kinds of settings, together and alone."""
    logits = 3 * torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    kinds = [
        Sampling(), Sampling(1.0, seed=1), Sampling(0.5, 3, seed=2), Sampling(2.0, None, 0.5, seed=3),
        Sampling(1.5, 10, 0.8, seed=4), Sampling(1.0, min_p=0.2, seed=5), Sampling(bias={7: 50.0}),
    ]  # fmt: skip
    together = chosen(logits, *kinds)
    assert together == [chosen(row[None], kind)[0] for row, kind in zip(logits, kinds, strict=True)]
    assert together[-1] == 7
    warped = warp(logits[1:6], kinds[1:6])
    for row, kind in enumerate(kinds[1:6]):
        assert torch.equal(warped[row], warp(logits[row + 1][None], [kind])[0])


def test_min_p_and_repetition_are_what_transformers_does() -> None:
    logits = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    for min_p in (0.01, 0.3, 1.0):
        expected = MinPLogitsWarper(min_p)(None, logits.clone())
        assert torch.equal(warp(logits, [Sampling(1.0, min_p=min_p)] * 4), expected)
    text = (3, 5, 5, 9)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([text] * 4), logits)
    rows = completions(*[Sampling(repetition_penalty=1.7)] * 4, text=text, num_prompt=2)
    assert torch.equal(adjust(logits, rows, [text] * 4), expected)


def test_frequency_and_presence_count_the_text_and_not_the_prompt() -> None:
    rows = completions(Sampling(frequency_penalty=0.5, presence_penalty=0.25), text=(1, 1, 2, 3, 3), num_prompt=2)
    lowered = adjust(torch.zeros(1, 5), rows, [rows[0].tokens])
    assert lowered.tolist() == [[0, 0, -0.75, -1.25, 0]]


def test_a_bias_may_forbid_and_no_end_comes_before_min_tokens() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0]])
    assert chosen(logits, Sampling(bias={1: -100.0})) == [2]
    assert chosen(logits, Sampling(min_tokens=2, eos=(1,), stop_ids=(2,))) == [0]
    assert chosen(logits, Sampling(min_tokens=2, eos=(1,), ignore_eos=True)) == [1]
    assert chosen(logits, Sampling(min_tokens=2, eos=(1,)), text=(0, 4, 4)) == [1]
    assert logits.tolist() == [[1.0, 5.0, 3.0]], "the model's own logits are what log-probabilities are of"


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    expected = logits.log_softmax(-1)
    found = logprobs_of(logits, [4, 5, 6], [0, 2, 40])
    for row, (one, token) in enumerate(zip(found, (4, 5, 6), strict=True)):
        assert one.token == token
        assert one.logprob == pytest.approx(expected[row, token].item(), abs=1e-6)
    assert [len(one.top) for one in found] == [0, 2, 30]
    values, ids = expected[1].topk(2)
    assert [token for token, _ in found[1].top] == ids.tolist()
    assert [value for _, value in found[1].top] == pytest.approx(values.tolist(), abs=1e-6)


def test_frequencies_are_the_probabilities() -> None:
    """A chi-square over 20,000 draws; one fair sampler in 10,000 would fail, and the seed is fixed."""
    sampling = Sampling(temperature=0.7, top_k=6, seed=0)
    logits = torch.tensor([1.0, -2.0, 0.5, 2.0, 0.0, 1.5, -1.0, 0.2])
    numbers = random_stream(0, [1, 2], 0)
    draws = [numbers.random() for _ in range(20_000)]
    counts = draw(warp(logits.expand(len(draws), -1), [sampling] * len(draws)), draws).bincount(minlength=8)
    expected = warp(logits[None], [sampling]).softmax(-1)[0] * len(draws)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert kept.sum() == 6
    assert chi_square < 25.7  # 5 degrees of freedom


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    number=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_draw_takes_a_token_that_was_left_out(logits: list[float], number: float, top_p: float) -> None:
    sampling = Sampling(temperature=1.0, top_p=top_p)
    warped = warp(torch.tensor([logits]), [sampling])
    assert warped[0, draw(warped, [number]).item()] > -math.inf


def test_the_ends_of_the_draw_take_the_first_and_the_last_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2)
    assert draw(logits, [0.0, math.nextafter(1, 0)]).tolist() == [1, 2]


def test_what_is_no_number_draws_no_token_beyond_the_vocabulary() -> None:
    assert draw(torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, math.inf]]), [0.1, 0.9]).max() < 3


def test_random_numbers_depend_on_seed_prompt_and_index_alone() -> None:
    first = [random_stream(1, [2, 3], 0).random() for _ in range(2)]
    assert first[0] == first[1]
    others = [random_stream(2, [2, 3], 0), random_stream(1, [3, 2], 0), random_stream(1, [2, 3], 1)]
    assert len({first[0], *(other.random() for other in others)}) == 4
    assert random_stream(None, [1], 0).random() != random_stream(None, [1], 0).random()


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e300}, r"temperature is 1e\+300; it must be from 0 .* to 100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300; it must be from 0.01 to 100"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens is 9; it must be from 0 to max_tokens \(8\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"frequency_penalty": 3.0}, "frequency_penalty is 3.0"),
        ({"presence_penalty": -3.0}, "presence_penalty is -3.0"),
        ({"bias": {5: 101.0}}, "the logit bias of token 5 is 101.0"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings_)
