"""The loss scaler: when it moves, and what a resumed run knows of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.train.scaler import LossScaler


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wide_numbers_need_no_scale(precision: str) -> None:
    scaler = LossScaler.of(precision)
    for _ in range(3 * scaler.patience):
        scaler.succeeded()
    assert scaler.scale == 1
    assert not scaler.overflowed(1.0)
    assert scaler.scale == 1


def test_an_overflow_halves_and_a_run_of_good_steps_doubles() -> None:
    scaler = LossScaler.of("fp16")
    assert scaler.scale == 2**16
    assert scaler.overflowed(3.0)
    assert scaler.scale == 2**15
    for _ in range(scaler.patience - 1):
        scaler.succeeded()
    assert scaler.scale == 2**15
    scaler.succeeded()
    assert scaler.scale == 2**16
    scaler.succeeded()
    assert scaler.overflowed(3.0)
    for _ in range(scaler.patience - 1):
        scaler.succeeded()
    assert scaler.scale == 2**15  # an overflow starts the count again


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_overflow(loss: float) -> None:
    scaler = LossScaler.of("fp16")
    assert not scaler.overflowed(loss)
    assert scaler.scale == 2**16


def test_where_nothing_is_left_to_halve_the_gradient_is_to_blame() -> None:
    scaler = LossScaler.of("fp16")
    halvings = 0
    while scaler.overflowed(1.0):
        halvings += 1
    assert (halvings, scaler.scale) == (16, 1)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_a_resumed_scaler_goes_on_alike(overflows: list[bool], at: int) -> None:
    def go(scaler: LossScaler, steps: list[bool]) -> LossScaler:
        for overflow in steps:
            scaler.overflowed(1.0) if overflow else scaler.succeeded()
        return scaler

    first = go(LossScaler.of("fp16"), overflows[:at])
    first.patience = 5
    resumed = LossScaler.of("fp16")
    resumed.patience = 5
    resumed.restore(first.state())
    assert go(resumed, overflows[at:]) == go(first, overflows[at:])


def test_a_checkpoint_of_another_precision_says_nothing() -> None:
    fp32, fp16 = LossScaler.of("fp32"), LossScaler.of("fp16")
    fp16.overflowed(1.0)
    resumed = LossScaler.of("fp32")
    resumed.restore(fp16.state())
    assert resumed == fp32
    resumed = LossScaler.of("fp16")
    resumed.restore(fp32.state())
    assert resumed.scale == 2**16  # not 1, from where it would take 30,000 steps to rise
