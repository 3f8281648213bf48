"""Engines and prompts drawn at random: each text goes on as the plain model, without a cache, says.

WEFT_EXAMPLES=1000 python -m pytest tests/unit/test_drawn_engines.py    # minutes; others each time
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_drawn_shapes import shapes

from draws import draws
from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import generate
from weft.serve.requests.request import Sampling

TIE = 1e-4
"""Logits this near may come in either order."""
Prompts = list[list[int]]


@st.composite
def engines(draw: Any) -> tuple[Shape, EngineConfig, Prompts, int]:
    """A model, its engine, prompts of which some begin alike, and how many tokens each is to go on by."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    shape = draw(shapes().filter(bool)).model_copy(update={"init_std": one(0.15, 0.3)})
    sequences, drafted = one(1, 2, 3, 5), one(0, 0, 0, 1, 3)
    least = sequences * (1 + drafted)
    config = EngineConfig(
        max_sequences=sequences, draft_tokens=drafted, block_tokens=one(1, 2, 4, 16),
        cache_tokens=one(None, shape.max_seq, shape.max_seq + 8, 2 * shape.max_seq), prefix_cache=one(False, True),
        invariant=not drafted and one(False, False, True), step_tokens=one(0, least + 300), compile=False, device="cpu",
    )  # fmt: skip
    room = shape.max_seq // 16 * 16  # in whole blocks of a cache of its length
    numbers = draw(st.randoms(use_true_random=False))
    stem = [numbers.randrange(shape.vocab) for _ in range(room // 2)]
    prompts = []
    for _ in range(one(1, 3, 6, 9)):
        begin = stem[: numbers.randrange(len(stem) + 1)] if numbers.random() < 0.5 else []
        rest = numbers.randrange(1, room - len(begin))
        prompts.append(begin + [numbers.randrange(shape.vocab) for _ in range(rest)])
    return shape, config, prompts, min(one(1, 3, 8, 20), *(room - len(prompt) for prompt in prompts))


@draws(25)
@given(drawn=engines())
def test_every_text_goes_on_as_the_plain_model_says(drawn: tuple[Shape, EngineConfig, Prompts, int]) -> None:
    shape, config, prompts, count = drawn
    torch.manual_seed(0)
    model = Decoder(shape).eval()
    engine = Engine(model, None, config)
    for _ in ("with an empty cache", "with one that knows them"):
        texts: Prompts = [[] for _ in prompts]
        for index, output in generate(engine, prompts, Sampling(max_tokens=count, temperature=0)):
            texts[index] += output.tokens
        for prompt, text in zip(prompts, texts, strict=True):
            assert len(text) == count
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
            assert (logits.max(dim=1).values - chosen).max() < TIE
