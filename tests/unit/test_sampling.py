"""Sampling: the filters against transformers' warpers, and the frequencies of what is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from weft.serve.sampling import Sampling, random_stream, sample, warp


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("grid", [0.0, 0.5])  # logits on a grid are tied
def test_warp_is_what_transformers_does(temperature: float, top_k: int | None, top_p: float, grid: float) -> None:
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits = (logits / grid).round() * grid if grid else logits
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(warp(logits, Sampling(temperature, top_k, top_p)), expected, rtol=0, atol=0)


def test_temperature_0_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    assert sample(logits, Sampling(), []).tolist() == [1, 0]
    assert sample(logits, Sampling(temperature=1.0, top_k=1), [0.0, 0.999]).tolist() == [1, 0]


def test_frequencies_are_the_probabilities() -> None:
    """A chi-square over 20,000 draws; one fair sampler in 10,000 would fail, and the seed is fixed."""
    sampling = Sampling(temperature=0.7, top_k=6, seed=0)
    logits = torch.tensor([1.0, -2.0, 0.5, 2.0, 0.0, 1.5, -1.0, 0.2])
    numbers = random_stream(0, [1, 2], 0)
    draws = [numbers.random() for _ in range(20_000)]
    counts = sample(logits.expand(len(draws), -1), sampling, draws).bincount(minlength=8)
    expected = warp(logits[None], sampling).softmax(-1)[0] * len(draws)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert kept.sum() == 6
    assert chi_square < 25.7  # 5 degrees of freedom


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    draw=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_draw_takes_a_token_that_was_left_out(logits: list[float], draw: float, top_p: float) -> None:
    sampling = Sampling(temperature=1.0, top_p=top_p)
    token = sample(torch.tensor([logits]), sampling, [draw]).item()
    assert warp(torch.tensor([logits]), sampling)[0, token] > -math.inf


def test_the_ends_of_the_draw_take_the_first_and_the_last_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2)
    assert sample(logits, Sampling(temperature=1.0), [0.0, math.nextafter(1, 0)]).tolist() == [1, 2]


def test_random_numbers_depend_on_seed_prompt_and_copy_alone() -> None:
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
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings_)
