"""Copies of weights in a low precision, and gradients beside them, without processes."""

from __future__ import annotations

import pytest
import torch

from weft.config.layout import Layout
from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.parallel.lowered import Lowered

SHAPE = Shape(family="gpt2", num_layers=2, hidden=16, num_heads=2, vocab=33, max_seq=8)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE)


def test_a_tied_matrix_stays_one(model: Decoder) -> None:
    names = [name for name, _ in model.named_parameters()]
    lowered = Lowered(model, torch.bfloat16)
    assert model.embed is not None
    assert model.head is not None
    assert model.head.weight is model.embed.weight
    assert list(lowered.weights) == names == [name for name, _ in model.named_parameters()]
    assert {weight.dtype for weight in lowered.weights.values()} == {torch.float32}
    assert {copy.dtype for copy in model.parameters()} == {torch.bfloat16}


def test_copies_follow_their_weights(model: Decoder) -> None:
    lowered = Lowered(model, torch.bfloat16)
    for change in (0.0, 0.25):
        for weight in lowered.weights.values():
            weight.data += change
        lowered.refresh()
        for name, copy in model.named_parameters():
            assert torch.equal(copy, lowered.weights[name].bfloat16())


def test_gradients_add_up_in_fp32(model: Decoder) -> None:
    """What one pass is too small to change in bf16 still counts; the copies keep nothing."""
    lowered = Lowered(model, torch.bfloat16)
    weight, copy = lowered.weights["norm.weight"], model.get_parameter("norm.weight")
    for factor in (1.0, 2.0**-10, 2.0**-10):
        (copy.float() * factor).sum().backward()
        assert copy.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((16,), 1 + 2.0**-9))
    assert all(other.grad is None for name, other in lowered.weights.items() if name != "norm.weight")


def test_gradients_that_come_without_a_pass(model: Decoder) -> None:
    lowered = Lowered(model, torch.bfloat16)
    for _ in range(2):
        for copy in model.parameters():
            copy.grad = torch.ones_like(copy)
        lowered.collect()
    assert all(weight.grad is not None and (weight.grad == 2).all() for weight in lowered.weights.values())


@pytest.mark.parametrize(
    ("layout", "sharded", "lowered"),
    [
        ("single", False, False),
        ("bf16", False, True),
        ("dp2.tp2.pp2.fp16", False, True),
        ("cp2.fp8", False, True),
        ("dp2.bf16.bf16grads", True, False),
        ("bf16.bf16grads", False, True),
        ("fsdp2", True, False),
        ("fsdp2.bf16", True, False),
        ("bf16.offloadweights", True, False),
    ],
)
def test_who_holds_the_weights(layout: str, sharded: bool, lowered: bool) -> None:
    parsed = Layout.parse(layout)
    assert (parsed.sharded, parsed.lowered) == (sharded, lowered)
