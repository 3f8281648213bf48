"""Which samples are to blame, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from weft.config.load import make_config
from weft.launch.process import start_process, stop_process
from weft.parallel.woven import Rows
from weft.train.nonfinite import culprits, describe
from weft.train.step import Found, find_gradients
from weft.train.training import Training, build

CONFIG = make_config(
    {
        "model": {
            "family": "llama", "num_layers": 1, "hidden": 16, "num_heads": 2, "ffn": 16, "vocab": 11, "max_seq": 8,
        },
        "train": {"global_batch": 6, "device": "cpu"},
    }
)  # fmt: skip


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    process = start_process("cpu")
    yield build(CONFIG, process.device)
    stop_process()


def poison(training: Training, token: int) -> None:
    """The token's row of the embedding is not a number."""
    for weight in training.woven.weights:
        if weight.name == "embed.weight":
            weight.data[token] = math.nan


def rows() -> Rows:
    tokens = torch.arange(6 * 8).view(6, 8) % 9
    return Rows(tokens, (tokens + 1) % 9)


def test_each_sample_is_tried_alone(training: Training) -> None:
    poison(training, 10)
    batch = rows()
    batch.tokens[1, 7] = 10
    batch.tokens[4, 0] = 10
    before = [weight.data.clone() for weight in training.woven.weights]
    found = find_gradients(training.woven, training.scaler, batch)
    assert not found.finite
    assert culprits(training, batch, first_sample=600) == [601, 604]
    for old, weight in zip(before, training.woven.weights, strict=True):
        assert torch.equal(old.view(torch.int32), weight.data.view(torch.int32))


def test_nobody_is_to_blame_for_a_gradient(training: Training) -> None:
    assert culprits(training, rows(), first_sample=0) == []


def test_the_words() -> None:
    one = describe(7, Found(math.nan, math.nan, False), [50], 48, 8)
    assert one == "step 7, samples 48 to 55: the loss is nan, because of sample 50"
    many = describe(7, Found(math.inf, math.nan, False), list(range(48, 60)), 48, 16)
    assert many.endswith("the loss is inf, because of samples 48, 49, 50, 51, 52, 53, 54, 55, …")
    none = describe(7, Found(2.5, math.inf, False), [], 48, 8)
    assert (
        none
        == "step 7, samples 48 to 55: gradient norm inf, though each sample's loss is finite: the gradient overflows"
    )
