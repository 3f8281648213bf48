"""Static shapes: a compiled dense model is compiled once. To compile anew costs minutes, and no CUDA graph outlives it."""

from __future__ import annotations

import pytest
import torch
from harness import make, run_forked, warm_compiler
from torch._dynamo.utils import counters

from weft.train.step import find_gradients, update
from weft.train.training import Training, build
from weft.verify.trace import step_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler's own


def one_step(training: Training, step: int) -> None:
    found = find_gradients(training.woven, training.scaler, step_rows(training, None, step))
    update(training.woven, training.optimizer, training.scaler, found, lr=1e-3, clip_norm=1.0, bias_speed=0.0)


@pytest.mark.parametrize("layout", ["mb4.compile", "fsdp2.tp2.sp.mb2.bf16.compile", "pp2.mb4.compile"])
def test_nothing_compiles_after_the_first_step(layout: str) -> None:
    warm_compiler()
    config, longer = make("llama", layout), make("llama", layout, train={"seq": 24})

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        one_step(training, 1)
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        assert not counters["graph_break"]
        one_step(training, 2)
        one_step(training, 3)
        assert counters["stats"]["unique_graphs"] == compiled
        if config.layout.world == 1:  # the negative control: another shape does
            one_step(build(longer, torch.device("cpu")), 1)
            assert counters["stats"]["unique_graphs"] > compiled

    run_forked(config.layout.world, work)
