"""weft's generation against transformers', against the model without a cache, and against itself alone."""

from __future__ import annotations

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
from weft.serve.cache import KeyValues
from weft.serve.generate import Generation, complete, generate, who_sees_whom
from weft.serve.sampling import Sampling

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


@pytest.mark.parametrize("seed", [0, 1, 2])
@families
def test_a_batch_gives_what_transformers_gives_for_each_prompt(family: Family, seed: int) -> None:
    reference, model = models(family, seed)
    prompts = random_prompts(seed, 19, 1, 11)
    completions = complete(model, prompts, Sampling(max_tokens=44))
    assert completions == [by_transformers(reference, prompt, 44) for prompt in prompts]
    assert len({token for completion in completions for token in completion}) > 20, "so monotonous a text proves little"
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.inference_mode():
            top = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4, "nearly tied: rounding decides"


@families
def test_logits_of_every_step_are_those_without_a_cache(family: Family) -> None:
    _, model = models(family, 0)
    prompts = random_prompts(5, 3, 17, 8)
    batch = Generation(model, prompts, Sampling(max_tokens=30))
    texts, seen = [list(prompt) for prompt in prompts], []
    while batch.rows:
        logits_of = batch.logits

        def watched(logits_of=logits_of) -> torch.Tensor:
            seen.append(logits_of())
            return seen[-1]

        batch.logits = watched
        for index, token in batch.step():
            texts[index].append(token)
        del batch.logits
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        with torch.inference_mode():
            whole = model(torch.tensor([text[:-1]]))[0, len(prompt) - 1 :]
        cached = torch.stack([logits[index] for logits in seen])
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


@families
def test_sampled_batch_equals_solo(family: Family) -> None:
    _, model = models(family, 1)
    prompts = random_prompts(7, 2, 30, 9, 9)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3, max_tokens=20)
    alone = [complete(model, [prompt], sampling)[0] for prompt in prompts]
    assert complete(model, prompts, sampling) == alone
    assert complete(model, prompts[::-1], sampling) == alone[::-1]


def test_equal_prompts_get_different_samples_and_a_seed_repeats_them() -> None:
    _, model = models("llama", 0)
    prompts = [[1, 2, 3]] * 3
    sampling = Sampling(temperature=1.0, seed=11, max_tokens=20)
    first = complete(model, prompts, sampling)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert complete(model, prompts, sampling) == first
    other = Sampling(temperature=1.0, seed=12, max_tokens=20)
    assert complete(model, prompts, other) != first
    unseeded = Sampling(temperature=1.0, max_tokens=20)
    assert complete(model, prompts, unseeded) != complete(model, prompts, unseeded)


@families
def test_an_end_token_ends_its_sequence_only(family: Family) -> None:
    _, model = models(family, 0)
    prompts = random_prompts(2, 4, 12, 7)
    whole = complete(model, prompts, Sampling(max_tokens=30))
    ends = (whole[0][6], whole[2][12])
    cut = complete(model, prompts, Sampling(max_tokens=30, eos=ends))
    for long, short in zip(whole, cut, strict=True):
        at = min((long.index(end) for end in ends if end in long), default=29)
        assert short == long[: at + 1]
    assert len(cut[0]) <= 7


def test_steps_name_the_sequence_of_each_token() -> None:
    _, model = models("gpt2", 0)
    steps = list(generate(model, [[1, 2], [3]], Sampling(max_tokens=3)))
    assert [index for index, _ in steps] == [0, 1, 0, 1, 0, 1]
    assert list(generate(model, [], Sampling())) == []


@families
def test_generation_ends_with_the_context(family: Family) -> None:
    _, model = models(family, 0)
    prompts = random_prompts(3, 60, 63, 62)
    completions = complete(model, prompts, Sampling(max_tokens=100))
    assert list(map(len, completions)) == [4, 1, 2]
    with pytest.raises(ValueError, match="prompt 2 has 64 tokens; the model's context holds 64"):
        complete(model, [[1], [1] * 64], Sampling())


def test_prompts_that_no_model_can_read_are_refused() -> None:
    _, model = models("gpt2", 0)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        complete(model, [[1], []], Sampling())
    with pytest.raises(ValueError, match="prompt 1 has a token outside the model's vocabulary of 97"):
        complete(model, [[97]], Sampling())


def test_the_cache_grows_by_doubling_up_to_its_limit() -> None:
    storage, parts = KeyValues(capacity=3, limit=10), torch.randn(2, 2, 1, 9, 4)
    sizes = []
    for start, end in [(0, 2), (2, 3), (3, 4), (4, 7), (7, 9)]:
        keys, values = storage.append(parts[0][:, :, start:end], parts[1][:, :, start:end])
        assert torch.equal(torch.stack((keys, values)), parts[:, :, :, :end])
        sizes.append(storage.capacity)
    assert sizes == [3, 3, 6, 10, 10]
    storage.keep(torch.tensor([1]))
    keys, _ = storage.append(parts[0][1:, :, :1], parts[1][1:, :, :1])
    assert torch.equal(keys[:, :, :9], parts[0][1:])


def test_a_cache_that_grew_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models("llama", 0)
    prompts = random_prompts(4, 5, 9)
    roomy = complete(model, prompts, Sampling(max_tokens=40))
    monkeypatch.setattr("weft.serve.generate.FIRST_ROOM", 2)
    assert complete(model, prompts, Sampling(max_tokens=40)) == roomy


def test_the_head_is_computed_for_the_last_token_alone() -> None:
    _, model = models("llama", 0)
    shapes: list[torch.Size] = []
    handle = model.head.register_forward_hook(lambda module, inputs, logits: shapes.append(logits.shape))
    complete(model, random_prompts(0, 12, 5), Sampling(max_tokens=3))
    handle.remove()
    assert shapes == [(2, 1, 97)] * 3


def test_padding_is_seen_by_itself_alone() -> None:
    """A query that saw nothing would be a softmax over nothing, which some backends answer with NaN."""
    mask = who_sees_whom(torch.tensor([2, 0]), True, 0, 4, window=2)
    assert mask is not None
    assert mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
    ]
