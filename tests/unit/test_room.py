"""Sliding windows: a sequence gives back the blocks that it no longer sees, and says the same."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from test_engine import outputs_of, random_prompts

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.requests.request import Request, Sampling
from weft.serve.schedule.room import Room

WINDOW = 9
SAMPLED = Sampling(1.0, seed=5, max_tokens=140)


@cache
def decoder(seed: int = 0, window: int | None = WINDOW) -> Decoder:
    torch.manual_seed(seed)
    shape = Shape(
        family="mistral", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=48, vocab=97, max_seq=320,
        init_std=0.3, sliding_window=window,
    )  # fmt: skip
    return Decoder(shape)


def unbounded(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Texts of an engine that gives nothing back."""
    engine = Engine(decoder(), None, EngineConfig(block_tokens=4))
    engine.scheduler.room = Room(4, 512, None)
    found = outputs_of(engine, *(Request(str(index), prompt, sampling) for index, prompt in enumerate(prompts)))
    return [[token for one in found[str(index), 0] for token in one.tokens] for index in range(len(prompts))]


def held(engine: Engine) -> int:
    """Blocks that running sequences hold, by their tables: nobody else holds any."""
    blocks = [block for one in engine.scheduler.running for block in one.blocks if block < engine.blocks.count]
    counts = [blocks.count(block) for block in range(engine.blocks.count)]
    assert counts == engine.blocks.holders
    assert engine.blocks.num_free == counts.count(0)
    return len(set(blocks))


def test_no_sequence_holds_more_than_was_planned() -> None:
    """By trying every way to cut so many tokens into steps, of which only the longest one at each place matters."""
    for block in (1, 2, 5):
        for window in (1, 2, 3, 5, 6, 11, 40):
            for step in (1, 3, 8):
                room = Room(block, step, window)
                for computed in (0, 7, 19):
                    starts = range(computed, 45)
                    tried = [room.blocks(min(45, at + step)) - room.behind(at) for at in starts]
                    assert max(tried) <= room.most(45, computed) <= max(tried) + 2
                    for at in starts:
                        first_seen = max(0, at - window + 1)
                        assert room.behind(at) * block <= first_seen, "a block is seen that was given back"
    assert Room(16, 512, None).most(100, 50) == 7


@pytest.mark.parametrize("step", [6, 512])
def test_a_long_text_keeps_few_blocks(step: int) -> None:
    [prompt] = random_prompts(0, 60)
    engine = Engine(decoder(), None, EngineConfig(max_sequences=4, step_tokens=step, block_tokens=4))
    engine.add(Request("a", prompt, SAMPLED))
    text, most = [], []
    while engine.busy:
        text += [token for output in engine.step() for token in output.tokens]
        most.append(held(engine))
    assert [text] == unbounded([prompt], SAMPLED)
    assert len(text) == 140
    assert max(most) <= 4, "the window, and where it begins and ends"
    assert max(most[1:-1]) - min(most[1:-1]) <= 1
    assert engine.blocks.num_free == engine.blocks.count


def test_more_run_at_once_and_texts_may_be_longer_than_the_cache() -> None:
    """32 blocks of 4 tokens: 6 texts of 200, side by side."""
    prompts = random_prompts(1, *6 * [60])
    config = EngineConfig(max_sequences=6, step_tokens=12, block_tokens=4, cache_tokens=128)
    engine = Engine(decoder(), None, config)
    assert engine.max_context == 320
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, SAMPLED))
    texts: list[list[int]] = [[] for _ in prompts]
    together = 0
    while engine.busy:
        for output in engine.step():
            texts[int(output.id)] += output.tokens
        held(engine)
        together = max(together, len(engine.scheduler.running))
    assert texts == unbounded(prompts, SAMPLED)
    assert together == 6
    assert engine.stats().preemptions == 0
    whole = Engine(decoder(window=None), None, config)
    assert whole.max_context == 128, "without a window"
    assert Engine(decoder(), None, EngineConfig(block_tokens=4, cache_tokens=128)).max_context == 128, "512 in one step"


@pytest.mark.parametrize("more", [{}, {"invariant": True}, {"prefix_cache": False}, {"draft_tokens": 2}])
def test_what_is_shared_preempted_and_cancelled_leaks_nothing(more: dict) -> None:
    """Prompts that begin alike come and go in a cache that is too small for them; each says what it says alone."""
    numbers = random.Random(3)
    stem = random_prompts(2, 70)[0]
    config = EngineConfig(max_sequences=4, step_tokens=12, block_tokens=4, cache_tokens=64, **more)
    engine = Engine(decoder(), None, config, draft=decoder(1) if more.get("draft_tokens") else None)
    asked: dict[str, list[int]] = {}
    texts: dict[str, list[int]] = {}
    cancelled = set()
    for step in range(120):
        if len(asked) < 12 and step % 6 == 0:
            name = str(len(asked))
            asked[name] = stem[: numbers.randrange(1, 70)] + random_prompts(step, numbers.randrange(1, 8))[0]
            engine.add(Request(name, asked[name], Sampling(1.0, seed=1, max_tokens=24), priority=numbers.randrange(3)))
            texts[name] = []
        if step % 40 == 39 and engine.scheduler.running:
            name = numbers.choice(engine.scheduler.running).request.id
            engine.cancel(name)
            cancelled.add(name)
        for output in engine.step():
            texts[output.id] += output.tokens
        held(engine)
    while engine.busy:
        for output in engine.step():
            texts[output.id] += output.tokens
        held(engine)
    expected = complete(decoder(), list(asked.values()), Sampling(1.0, seed=1, max_tokens=24))
    for name, alone in zip(asked, expected, strict=True):
        assert texts[name] == alone[: len(texts[name])]
        assert name in cancelled or len(texts[name]) == 24
    assert engine.stats().preemptions > 0
    assert (engine.stats().cached_tokens > 0) == ("prefix_cache" not in more)
    assert engine.blocks.num_free == engine.blocks.count


def test_a_prompt_is_found_again_behind_its_window() -> None:
    engine = Engine(decoder(), None, EngineConfig(block_tokens=4))
    [prompt] = random_prompts(6, 61)
    sampling = Sampling(1.0, seed=2, max_tokens=20)
    first = outputs_of(engine, Request("a", prompt, sampling, n=2))
    again = outputs_of(engine, Request("b", prompt, sampling, n=2))
    assert [one.tokens for key in first for one in first[key]] == [one.tokens for key in again for one in again[key]]
    assert [first["a", index][0].cached for index in (0, 1)] == [0, 60]
    assert [again["b", index][0].cached for index in (0, 1)] == [60, 60]


@pytest.mark.parametrize(("window", "few"), [(5, True), (30, False), (None, False)])
def test_a_draft_model_may_see_further(window: int | None, few: bool) -> None:
    """Both have the same tables: what one of them sees is kept."""
    [prompt] = random_prompts(0, 20)
    draft = decoder(1, window)
    engine = Engine(decoder(), None, EngineConfig(block_tokens=4, draft_tokens=3), draft=draft)
    engine.add(Request("a", prompt, Sampling(max_tokens=80)))
    text, most = [], 0
    while engine.busy:
        text += [token for output in engine.step() for token in output.tokens]
        most = max(most, held(engine) if len(text) > 70 else 0)
    assert [text] == unbounded([prompt], Sampling(max_tokens=80))
    assert (most <= 5) == few
    assert (most > 20) == (window is None)
