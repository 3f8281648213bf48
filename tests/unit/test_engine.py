"""The engine against transformers' generate, against the model without a cache, and against itself alone."""

from __future__ import annotations

import copy
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers

from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.models.huggingface import config_from_shape
from weft.models.shape import Experts, Family, Latent, RopeScaling, Shape, Yarn
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete, generate
from weft.serve.requests.request import Output, RefusedError, Request, Sampling

# texts grow longer than the windows and than the context that the rotary scaling stretches
SMALL = {"num_layers": 2, "hidden": 48, "num_heads": 4, "ffn": 96, "vocab": 97, "max_seq": 64}
SCALING = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq=16)
SHAPES: dict[Family, Shape] = {
    "gpt2": Shape(family="gpt2", **SMALL),
    "llama": Shape(family="llama", **SMALL, num_kv_heads=2, rope_scaling=SCALING),
    "mistral": Shape(family="mistral", **SMALL, num_kv_heads=1, sliding_window=7),
    "qwen2": Shape(family="qwen2", **SMALL, num_kv_heads=2, tied=True),
    "qwen3": Shape(family="qwen3", **SMALL, num_kv_heads=2, head_dim=16, sliding_window=9),
    "mixtral": Shape(
        family="mixtral", **SMALL, num_kv_heads=2, experts=Experts(num_experts=4, per_token=2, ffn=96)
    ),
    "qwen3_moe": Shape(
        family="qwen3_moe", **SMALL, num_kv_heads=2, head_dim=16, experts=Experts(num_experts=4, per_token=2, ffn=24)
    ),
    "deepseek_v3": Shape(
        family="deepseek_v3", **SMALL, latent=Latent(q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=10),
        yarn=Yarn(factor=8, original_max_seq=16),
        experts=Experts(num_experts=4, per_token=2, ffn=24, shared=1, scores="sigmoid", groups=2, top_groups=1),
    ),
}  # fmt: skip
families = pytest.mark.parametrize("family", SHAPES)


@cache
def models(family: Family, seed: int) -> tuple[transformers.PreTrainedModel, Decoder]:
    """The same random weights in both libraries, large enough that texts vary and no two logits are nearly tied."""
    config = transformers.AutoConfig.for_model(**config_from_shape(SHAPES[family]))
    torch.manual_seed(seed)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
            weight.normal_(float(gain), 1.0 if "wpe" in name else 0.05 if name.endswith("bias") else 0.3)
    with TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        _, model = load_decoder(Path(folder))
    return reference, model


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=numbers).tolist() for length in lengths]


def by_transformers(reference: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    both = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return both[0, len(prompt) :].tolist()


SETTINGS = {
    "plain": EngineConfig(),
    "parts of prompts": EngineConfig(max_sequences=4, step_tokens=5, block_tokens=4),
    "preemption": EngineConfig(max_sequences=4, step_tokens=7, block_tokens=4, cache_tokens=80),
    "without prefixes": EngineConfig(block_tokens=2, prefix_cache=False),
}
"""Ways to run the same requests; 80 tokens of cache hold one of three texts that grow to 63, or the windows of all."""


@pytest.mark.parametrize("settings", SETTINGS)
@families
def test_a_batch_gives_what_transformers_gives_for_each_prompt(family: Family, settings: str) -> None:
    reference, model = models(family, 0)
    prompts = random_prompts(0, 19, 1, 11)
    engine = Engine(model, None, SETTINGS[settings])
    for again in (False, True):
        completions = run(engine, prompts, Sampling(max_tokens=44))
        assert completions == [by_transformers(reference, prompt, 44) for prompt in prompts], f"again: {again}"
    assert len({token for completion in completions for token in completion}) > 20, "so monotonous a text proves little"
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.inference_mode():
            top = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4, "nearly tied: rounding decides"
    stats = engine.stats()
    tight = settings == "preemption" and SHAPES[family].sliding_window is None  # windows are preempted in test_room.py
    assert (stats.preemptions > 0) == tight
    assert (stats.cached_tokens > 0) == (settings in ("plain", "parts of prompts") or tight)
    assert engine.blocks.num_free == engine.blocks.count


@pytest.mark.parametrize("seed", [1, 2])
@families
def test_other_weights_and_prompts(family: Family, seed: int) -> None:
    reference, model = models(family, seed)
    prompts = random_prompts(seed, 5, 30, 2, 9)
    expected = [by_transformers(reference, prompt, 30) for prompt in prompts]
    assert complete(model, prompts, Sampling(max_tokens=30)) == expected


def run(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    for index, output in generate(engine, prompts, sampling):
        completions[index] += output.tokens
    return completions


def outputs_of(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[Output]]:
    for request in requests:
        engine.add(request)
    found: dict[tuple[str, int], list[Output]] = {}
    while engine.busy:
        for output in engine.step():
            found.setdefault((output.id, output.index), []).append(output)
    return found


@families
def test_logprobs_are_those_without_a_cache(family: Family) -> None:
    """Of every token of prompts and texts, whatever was cut into parts, shared or computed again."""
    _, model = models(family, 0)
    prompts = random_prompts(5, 3, 17, 8)
    for config in (SETTINGS["preemption"], SETTINGS["plain"]):
        engine = Engine(model, None, config)
        for _ in range(1 + (config is SETTINGS["plain"])):
            requests = [
                Request(str(index), prompt, Sampling(max_tokens=30), logprobs=3, prompt_logprobs=2)
                for index, prompt in enumerate(prompts)
            ]
            found = outputs_of(engine, *requests)
            for index, prompt in enumerate(prompts):
                outputs = found[str(index), 0]
                text = [token for output in outputs for token in output.tokens]
                with torch.inference_mode():
                    expected = model(torch.tensor([prompt + text]))[0].log_softmax(-1)
                asked = outputs[0].prompt_logprobs
                assert asked is not None
                assert asked[0] is None
                assert all(output.prompt_logprobs is None for output in outputs[1:])
                told = [*asked[1:], *(one for output in outputs for one in output.logprobs or ())]
                assert [one.token for one in told if one] == (prompt + text)[1:]
                for at, one in enumerate(told):
                    assert one is not None
                    assert one.logprob == pytest.approx(expected[at, one.token].item(), abs=2e-4)
                    assert len(one.top) == (2 if at < len(prompt) - 1 else 3)
                    assert dict(one.top) == pytest.approx(
                        {token: expected[at, token].item() for token, _ in one.top}, abs=2e-4
                    )
                    assert one.top[0][1] == pytest.approx(expected[at].max().item(), abs=2e-4)


@families
def test_sampled_batch_equals_solo(family: Family) -> None:
    _, model = models(family, 1)
    prompts = random_prompts(7, 2, 30, 9, 9)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3, max_tokens=20)
    alone = [complete(model, [prompt], sampling)[0] for prompt in prompts]
    assert complete(model, prompts, sampling) == alone
    assert complete(model, prompts[::-1], sampling) == alone[::-1]
    tight = EngineConfig(max_sequences=3, step_tokens=6, block_tokens=4, cache_tokens=56)
    assert complete(model, prompts, sampling, tight) == alone


def test_completions_of_one_prompt_differ_and_a_seed_repeats_them() -> None:
    _, model = models("llama", 0)

    def three(seed: int | None, prompt: list[int], config: EngineConfig | None = None) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed, max_tokens=20)
        engine = Engine(model, None, config or EngineConfig(block_tokens=4))
        found = outputs_of(engine, Request("a", prompt, sampling, n=3))
        assert engine.blocks.num_free == engine.blocks.count
        shared = engine.stats().cached_tokens
        assert shared == (2 * ((len(prompt) - 1) // 4 * 4) if engine.config.prefix_cache else 0), "the prompt, once"
        return [[token for output in found["a", index] for token in output.tokens] for index in range(3)]

    prompt = random_prompts(1, 11)[0]
    first = three(11, prompt)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert three(11, prompt) == first
    assert three(11, prompt, EngineConfig(max_sequences=2, prefix_cache=False)) == first
    assert three(12, prompt) != first
    assert three(None, prompt) != three(None, prompt)


@families
def test_an_end_token_ends_its_sequence_only(family: Family) -> None:
    _, model = models(family, 0)
    prompts = random_prompts(2, 4, 12, 7)
    whole = complete(model, prompts, Sampling(max_tokens=30))
    ends = (whole[0][6], whole[2][12])
    for sampling in (Sampling(max_tokens=30, eos=ends), Sampling(max_tokens=30, stop_ids=ends, ignore_eos=True)):
        cut = complete(model, prompts, sampling)
        for long, short in zip(whole, cut, strict=True):
            at = min((long.index(end) for end in ends if end in long), default=29)
            assert short == long[: at + 1]
        assert len(cut[0]) <= 7
    assert complete(model, prompts, Sampling(max_tokens=30, eos=ends, ignore_eos=True)) == whole


@families
def test_generation_ends_with_the_context(family: Family) -> None:
    _, model = models(family, 0)
    prompts = random_prompts(3, 60, 63, 62)
    completions = complete(model, prompts, Sampling(max_tokens=100))
    assert list(map(len, completions)) == [4, 1, 2]
    with pytest.raises(ValueError, match="prompt 2: the prompt has 64 tokens; the context holds 64"):
        complete(model, [[1], [1] * 64], Sampling())
    small = Engine(model, None, EngineConfig(cache_tokens=24, block_tokens=8))
    assert small.max_context == 24, "what the cache holds"
    assert list(map(len, run(small, [[1] * 20], Sampling(max_tokens=100)))) == [4]


def test_an_old_request_is_not_starved_by_new_ones() -> None:
    """Two texts at most fit; new prompts keep coming, and still every step brings the oldest nearer to its end."""
    _, model = models("llama", 0)
    engine = Engine(model, None, EngineConfig(max_sequences=8, step_tokens=16, block_tokens=4, cache_tokens=48))
    engine.add(Request("old", [1] * 10, Sampling(max_tokens=20)))
    steps = tokens = 0
    while tokens < 20:
        engine.add(Request(f"new {steps}", [2 + steps] * 9, Sampling(max_tokens=12)))
        tokens += sum(len(output.tokens) for output in engine.step() if output.id == "old")
        steps += 1
    assert steps <= 21
    while engine.busy:
        engine.step()
    assert engine.stats().finished == {"length": steps + 1}
    assert engine.stats().preemptions > 0


def test_a_smaller_priority_goes_first_and_takes_the_place_of_others() -> None:
    _, model = models("llama", 0)
    engine = Engine(model, None, EngineConfig(max_sequences=1, block_tokens=4))
    engine.add(Request("low", [1, 2, 3], Sampling(max_tokens=10), priority=5))
    for _ in range(4):
        engine.step()
    engine.add(Request("middle", [1, 2, 4], Sampling(max_tokens=10), priority=3))
    engine.add(Request("high", [1, 2, 5], Sampling(max_tokens=10), priority=-1))
    ended = [output.id for _ in range(40) for output in engine.step() if output.finish]
    assert ended == ["high", "middle", "low"]


def test_cancelled_and_late_requests_end_and_give_their_blocks_back() -> None:
    _, model = models("llama", 0)
    engine = Engine(model, None, EngineConfig(max_sequences=2, block_tokens=4))
    now = time.monotonic()
    engine.add(Request("cancelled", [1, 2, 3], Sampling(max_tokens=50)))
    engine.add(Request("late", [1, 2, 4], Sampling(max_tokens=50), deadline=now + 0.05))
    engine.add(Request("waiting", [1, 2, 5], Sampling(max_tokens=50), deadline=now - 1))
    engine.step()
    engine.cancel("cancelled")
    engine.cancel("nobody")
    time.sleep(0.06)
    told = engine.step()
    assert {(output.id, output.finish) for output in told} == {("cancelled", "cancelled"), ("late", "deadline")}
    assert not engine.busy
    assert engine.blocks.num_free == engine.blocks.count
    assert engine.stats().finished == {"deadline": 2, "cancelled": 1}


def test_a_full_queue_refuses_and_what_waits_is_served() -> None:
    _, model = models("llama", 0)
    engine = Engine(model, None, EngineConfig(max_sequences=2, max_waiting=1))
    for name in "abc":
        engine.add(Request(name, [1, 2], Sampling(max_tokens=3)))
    with pytest.raises(RefusedError, match="3 completions are waiting already") as refused:
        engine.add(Request("d", [1, 2], Sampling(max_tokens=3)))
    assert refused.value.retry_after > 0
    while engine.busy:
        engine.step()
    engine.add(Request("d", [1, 2], Sampling(max_tokens=3)))


def test_tenants_share_no_blocks() -> None:
    _, model = models("llama", 0)
    engine = Engine(model, None, EngineConfig(block_tokens=4))
    prompt = random_prompts(3, 13)[0]
    cached = []
    for number, salt in enumerate(["one", "one", "two", "two"]):
        found = outputs_of(engine, Request(str(number), prompt, Sampling(max_tokens=2), salt=salt))
        cached.append(found[str(number), 0][0].cached)
    assert cached == [0, 12, 0, 12]
    engine.forget_prefixes()
    assert outputs_of(engine, Request("x", prompt, Sampling(max_tokens=2), salt="one"))["x", 0][0].cached == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_their_request_alone(temperature: float) -> None:
    _, model = models("llama", 0)
    model = copy.deepcopy(model)
    expected = complete(model, [[1, 2, 3]], Sampling(max_tokens=8))
    with torch.no_grad():
        model.embed.weight[50] = float("nan")
    engine = Engine(model, None, EngineConfig(block_tokens=4))
    bad = Request("bad", [1, 2, 50], Sampling(temperature, max_tokens=8), logprobs=1)
    good = Request("good", [1, 2, 3], Sampling(max_tokens=8))
    found = outputs_of(engine, bad, good)
    assert found["bad", 0][-1].finish == "error"
    assert found["bad", 0][-1].error == "the model's logits are not finite numbers"
    assert [token for output in found["good", 0] for token in output.tokens] == expected[0]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request("a", []), "the prompt is empty"),
        (Request("a", [97]), "the prompt has a token outside the model's vocabulary of 97"),
        (Request("a", [1], Sampling(stop_ids=(-1,))), "the list of stop ids has a token outside"),
        (Request("a", [1], Sampling(bias={97: 1.0})), "logit bias has a token outside"),
        (Request("a", [1], n=0), "n is 0"),
        (Request("a", [1], n=2), "n is 2, but every completion is the same at temperature 0"),
        (Request("a", [1], logprobs=21), "logprobs is 21; it must be from 0 to 20"),
        (Request("a", [1], prompt_logprobs=-1), "prompt_logprobs is -1"),
        (Request("a", [1], Sampling(stop=("x",))), "stop texts need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: Request, sentence: str) -> None:
    _, model = models("gpt2", 0)
    engine = Engine(model, None, EngineConfig())
    with pytest.raises(ValueError, match=sentence):
        engine.add(request_)
    engine.add(Request("a", [1]))
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add(Request("a", [1]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_waiting": -1}, "max_waiting is -1"),
        ({"step_tokens": 10}, "step_tokens is 10, fewer than 64 sequences of 1 tokens"),
        ({"cache_tokens": 0}, "cache_tokens is 0"),
        ({"gpu_share": 1.5}, "gpu_share is 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "raised"),
    [
        ({"cache_tokens": 5}, r"cache_tokens \(--cache-tokens\)$"),
        ({"cache_bytes": 5}, "cache_bytes$"),
        ({}, r"gpu_share \(--gpu-share\), or end what else"),
    ],
)
def test_a_cache_without_a_block_is_refused(settings: dict, raised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the setting that left it without, and the option of `weft serve` that sets it, if there is one."""
    monkeypatch.setattr("weft.serve.steps.runner.free_bytes", lambda device, gpu_share: 5)
    _, model = models("gpt2", 0)
    with pytest.raises(ValueError, match=rf"the cache has no room for one block of 16 tokens .*: raise {raised}"):
        Engine(model, None, EngineConfig(**settings))


def test_the_head_is_computed_where_it_is_needed_alone() -> None:
    _, model = models("llama", 0)
    shapes: list[torch.Size] = []
    handle = model.head.register_forward_hook(lambda module, inputs, logits: shapes.append(logits.shape))
    complete(model, random_prompts(0, 12, 5), Sampling(max_tokens=3))
    handle.remove()
    assert shapes == [(1, 2, 97)] * 3
