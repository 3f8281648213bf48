"""A model's blocks as one call, against the model's own code, batch by batch of an engine at work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import mean

import pytest
import torch
from test_engine import SHAPES, families, models, outputs_of, random_prompts
from torch import Tensor

from weft.models.decoder import Decoder
from weft.models.shape import Experts, Family, Shape, Yarn
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.kernels import native
from weft.serve.requests.request import Finish, Request, Sampling
from weft.serve.steps import stack
from weft.serve.steps.batch import Batch
from weft.serve.steps.runner import Runner

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler")

TAKEN = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
SETTINGS = {"max_sequences": 5, "step_tokens": 12, "block_tokens": 4}


class Both:
    """An engine whose every batch the model's own code computes as well, with a cache of its own, and once more in fp32.

    Attributes:
        taken: tokens of each batch that was one call.
        off: how far logits are from those in fp32: the engine's, and those of the model's own code; root mean squares.
    """

    def __init__(self, model: Decoder, draft: Decoder | None = None, **settings: object) -> None:
        config = EngineConfig(**{**SETTINGS, **settings})  # type: ignore[arg-type]
        self.engine = Engine(copy.deepcopy(model), None, config, draft=draft)
        self.ours = self.engine.runner
        self.plain, self.exact = (
            Runner(one, self.engine.blocks.count, config) for one in (self.ours.model, copy.deepcopy(model).float())
        )
        self.plain.stack = self.exact.stack = None
        self.taken: list[int] = []
        self.off: list[tuple[float, float]] = []
        self.run_ours, self.ours.run = self.ours.run, self.run  # type: ignore[method-assign]

    def run(self, batch: Batch) -> Iterator[Tensor]:
        assert self.ours.stack is not None
        if self.ours.stack.takes(batch):
            self.taken.append(len(batch.tokens))
        runs = self.run_ours(batch), self.plain.run(batch), self.exact.run(batch)
        for found, own, exact in zip(*runs, strict=True):
            errors = [float((one - exact).square().mean().sqrt()) for one in (found, own)]
            self.off.append((errors[0], errors[1]))
            if own.dtype == torch.float32:
                torch.testing.assert_close(found, own, rtol=2e-4, atol=2e-4)
            yield found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", TAKEN)
def test_logits_and_what_is_kept_are_the_models_own(family: Family, threads: int) -> None:
    both = Both(models(family, 0)[1], models(family, 0)[1], max_sequences=4, draft_tokens=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        prompts = [*random_prompts(3, 25, 1, 9, 6), [5, 6, 7] * 6]
        requests = [Request(str(n), prompt, Sampling(max_tokens=30 - n)) for n, prompt in enumerate(prompts)]
        outputs_of(both.engine, *requests)
    finally:
        torch.set_num_threads(before)
    assert len(both.taken) == both.engine.stats().steps
    assert {1, 12} <= set(both.taken), "one token of one text, and drafts or prompts of all"
    assert both.engine.stats().accepted > 0, "several tokens of a text at once"
    for found, expected in zip(both.ours.cache.layers, both.plain.cache.layers, strict=True):
        for ours, own in zip(stack.stores(found), stack.stores(expected), strict=True):
            assert own.rows.count_nonzero() > 0
            torch.testing.assert_close(ours.rows, own.rows, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", TAKEN)
def test_in_bf16(family: Family) -> None:
    torch.manual_seed(0)
    both = Both(Decoder(SHAPES[family]).bfloat16())
    requests = [
        Request(str(n), prompt, Sampling(max_tokens=20)) for n, prompt in enumerate(random_prompts(4, 9, 2, 30))
    ]
    outputs_of(both.engine, *requests)
    assert len(both.taken) == both.engine.stats().steps
    ours, own = (mean(errors) for errors in zip(*both.off, strict=True))
    assert 0 < ours < 1.2 * own, "as near to what fp32 says as the model's own code"


def test_stretched_rotations_and_heads_of_odd_halves() -> None:
    torch.manual_seed(0)
    shape = Shape(num_layers=3, hidden=70, num_heads=5, num_kv_heads=5, ffn=57, vocab=97, max_seq=64, init_std=0.2,
                  yarn=Yarn(factor=4, original_max_seq=16))  # fmt: skip
    assert shape.head_dim == 14
    both = Both(Decoder(shape))
    outputs_of(both.engine, *(Request(str(n), [n + 1], Sampling(max_tokens=50)) for n in range(3)))
    assert len(both.taken) == both.engine.stats().steps


@pytest.mark.parametrize("threads", [1, 3])
def test_experts_of_odd_sizes_whose_weights_do_not_add_up(threads: int) -> None:
    torch.manual_seed(0)
    experts = Experts(num_experts=7, per_token=3, ffn=23, norm_topk=False)
    shape = Shape(family="qwen3_moe", num_layers=3, hidden=70, num_heads=5, num_kv_heads=5, ffn=57, vocab=97, max_seq=64,
                  init_std=0.2, experts=experts)  # fmt: skip
    both = Both(Decoder(shape))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        outputs_of(both.engine, *(Request(str(n), [n + 1] * 9, Sampling(max_tokens=50)) for n in range(5)))
    finally:
        torch.set_num_threads(before)
    assert len(both.taken) == both.engine.stats().steps


def test_long_prompts_are_left_to_a_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "SEEN_AGAIN", 200)
    both = Both(models("llama", 0)[1])
    outputs_of(both.engine, Request("a", random_prompts(1, 60)[0], Sampling(max_tokens=4)))
    assert both.taken == [12, 1, 1, 1], "of the prompt's five steps the first"
    monkeypatch.setattr(both.ours.stack, "most", 2)
    both.taken.clear()
    outputs_of(both.engine, *(Request(str(n), [n + 1], Sampling(max_tokens=4)) for n in range(3)))
    assert both.taken == [], "for three rows other products are the fastest"


def test_what_is_no_number_stays_in_its_own_text() -> None:
    model = copy.deepcopy(models("qwen3", 0)[1])
    with torch.no_grad():
        model.embed.weight[96] = float("nan")  # type: ignore[union-attr]
    ended: dict[str, Finish | None] = {}
    for outputs in outputs_of(
        Engine(model, None, EngineConfig(**SETTINGS)),  # type: ignore[arg-type]
        *(Request(name, [1, token, 2], Sampling(max_tokens=5)) for name, token in (("good", 3), ("bad", 96))),
    ).values():
        ended[outputs[-1].id] = outputs[-1].finish
    assert ended == {"good": "length", "bad": "error"}


@families
def test_which_models_it_takes(family: Family) -> None:
    engine = Engine(copy.deepcopy(models(family, 0)[1]), None, EngineConfig(**SETTINGS))  # type: ignore[arg-type]
    assert (engine.runner.stack is not None) == (family in TAKEN)


@pytest.mark.parametrize("change", ["fp16", "int8 cache", "two dtypes", "no compiler", "an adapter's addition"])
def test_what_it_leaves_to_the_models_own_code(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(models("llama", 0)[1])
    if change == "fp16":
        model.half()
    if change == "two dtypes":
        model.blocks["1"].bfloat16()
    if change == "no compiler":
        for place in (native, stack):
            monkeypatch.setattr(place, "library", lambda: None)
    if change == "an adapter's addition":
        linear = model.blocks["0"].mlp.up  # type: ignore[union-attr]
        plain = linear.forward  # type: ignore[union-attr]
        monkeypatch.setattr(linear, "forward", lambda x: plain(x) + 1)
    cache = "int8" if change == "int8 cache" else "auto"
    config = EngineConfig(**SETTINGS, cache_dtype=cache)  # type: ignore[arg-type]
    assert Runner(model, 8, config).stack is None
