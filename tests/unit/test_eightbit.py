"""Moments of 8 bits: what is read is near what was written, and writing it again changes no bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.train.eightbit import BLOCK, EightBitAdamW, Moment, code_map


@pytest.mark.parametrize("signed", [True, False])
def test_the_map(signed: bool) -> None:
    values = code_map(signed)
    assert len(values) == 255
    assert values[0] == (-1 if signed else 0)
    assert values[-1] == 1
    assert 0 in values
    assert bool((values[1:] > values[:-1]).all())


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("size", [3, BLOCK, 5 * BLOCK + 7])
def test_reading_and_writing_again_changes_nothing(square: bool, size: int) -> None:
    """Of wide and narrow blocks, of zeros, of numbers at the end of fp32: what a resumed run stands on."""
    stream = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=stream) * torch.logspace(-22, 3, size)
    x = x.square() if square else x
    x[: size // 3] = 0
    moment = Moment(x, square)
    moment.write(0, x)
    once, codes, scales = moment.whole(), moment.codes.clone(), moment.scales.clone()
    moment.write(0, once)
    assert torch.equal(moment.codes, codes)
    assert torch.equal(moment.scales, scales)
    assert torch.equal(moment.whole(), once)


def test_numbers_keep_two_digits_and_the_largest_all() -> None:
    x = torch.randn(64 * BLOCK, generator=torch.Generator().manual_seed(0))
    moment = Moment(x)
    assert torch.equal(moment.whole(), torch.zeros_like(x))
    moment.write(0, x)
    error = (moment.whole() - x).abs()
    assert float(error.norm() / x.norm()) < 0.02
    assert float(error.max() / x.abs().max()) < 0.02
    largest = x.view(-1, BLOCK).abs().argmax(dim=1, keepdim=True)
    assert torch.equal(moment.whole().view(-1, BLOCK).gather(1, largest), x.view(-1, BLOCK).gather(1, largest))


def test_a_part_leaves_the_others_as_they_are() -> None:
    x = torch.rand(4 * BLOCK, generator=torch.Generator().manual_seed(0))
    moment = Moment(x, square=True)
    moment.write(0, x)
    before = moment.whole()
    moment.write(BLOCK, torch.zeros(BLOCK))
    assert torch.equal(moment.whole()[:BLOCK], before[:BLOCK])
    assert torch.equal(moment.whole()[2 * BLOCK :], before[2 * BLOCK :])
    assert not moment.read(BLOCK, BLOCK).any()


def test_small_gradients_that_end_beside_large_ones_throw_nothing() -> None:
    """Kept as it is, the second moment of a small one would become zero before the first does: an embedding of tokens that
    come seldom would jump to wherever eps lets it."""
    gradients = torch.logspace(-9, 0, BLOCK)
    weight: Any = SimpleNamespace(data=torch.zeros(BLOCK), grad=gradients)
    optimizer = EightBitAdamW([weight], (0.9, 0.95), 1e-8, decay=0.0)
    optimizer.step(1.0)
    weight.data.zero_()
    weight.grad = torch.zeros(BLOCK)
    optimizer.step(1.0)
    assert float(weight.data.abs().max()) < 2
