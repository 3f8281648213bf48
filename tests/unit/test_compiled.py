"""The compiled step says what the plain one says, and is compiled once for all blocks and batches."""

from __future__ import annotations

import copy

import pytest
import torch
from test_engine import models, random_prompts
from torch._dynamo.utils import counters

from weft.models.shape import Family
from weft.parallel import numbered
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.kernels.native import find_compiler
from weft.serve.requests.request import Sampling
from weft.serve.steps import compiled
from weft.serve.steps.runner import Runner

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # torch's own, while it loads its compiler
CONFIG = {"step_tokens": 24, "max_sequences": 8, "block_tokens": 4}
KINDS: dict[Family, int] = {"gpt2": 2, "qwen3": 2, "deepseek_v3": 4}
"""Functions: of one token and of more, and both before and behind the experts."""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_texts_are_those_of_the_plain_step(family: Family) -> None:
    torch.set_num_threads(1)
    _, model = models(family, 0)
    plain = complete(
        copy.deepcopy(model), prompts := random_prompts(1, 40, 3, 17, 9, 1), SAMPLING, EngineConfig(**CONFIG)
    )
    counters.clear()
    alone = copy.deepcopy(model)
    config = EngineConfig(**CONFIG, compile=True)
    assert complete(alone, prompts, SAMPLING, config) == plain  # batches of 1 to 24 tokens
    assert complete(alone, prompts[:1], SAMPLING, config) == plain[:1]
    assert complete(alone, prompts[1:3], SAMPLING, config) == plain[1:3], "another engine of the same model"
    assert counters["stats"]["unique_graphs"] == KINDS[family]
    assert complete(alone, prompts, SAMPLING, EngineConfig(**CONFIG)) == plain, "without compile it is what it was"
    assert counters["stats"]["unique_graphs"] == KINDS[family]


SAMPLING = Sampling(max_tokens=12)


def test_without_a_compiler_a_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    _, model = models("gpt2", 0)
    with pytest.raises(ValueError, match=r"compile: on a CPU it needs a C\+\+ compiler, and none of .* is here"):
        Engine(copy.deepcopy(model), None, EngineConfig(compile=True))


def test_layers_go_with_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled blocks find by number is held by nobody else."""
    monkeypatch.setattr(Runner, "warm_up", lambda runner: None)
    _, model = models("gpt2", 0)
    engine = Engine(copy.deepcopy(model), None, EngineConfig(compile=True))
    last = numbered.KNOWN[-1]
    assert last() is engine.runner.layers[-1]
    del engine
    assert last() is None
