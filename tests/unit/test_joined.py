"""Matrices of one input as one matrix: the same texts, and no weight twice."""

from __future__ import annotations

import copy

import pytest
import torch
from test_engine import SHAPES, families, models, outputs_of, random_prompts

from weft.models.attention import Attention
from weft.models.decoder import Decoder
from weft.models.mlp import SwigluMLP
from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.joined import JoinedAttention, JoinedSwigluMLP, join
from weft.serve.request import Request, Sampling


def texts(model: Decoder) -> dict:
    engine = Engine(model, None, EngineConfig(max_sequences=6, step_tokens=32, block_tokens=4))
    for number, prompt in enumerate(random_prompts(5, 30, 2, 9)):
        engine.add(Request(str(number), prompt, Sampling(max_tokens=8)))
    return {key: [output.tokens for output in outputs] for key, outputs in outputs_of(engine).items()}


@families
def test_texts_are_the_same(family: Family) -> None:
    plain, joined = (copy.deepcopy(models(family, 0)[1]) for _ in range(2))
    join(joined)
    kinds = {type(module) for module in joined.modules()}
    assert Attention not in kinds
    assert SwigluMLP not in kinds
    assert (JoinedAttention in kinds) == (SHAPES[family].latent is None)
    assert (JoinedSwigluMLP in kinds) == (SHAPES[family].activation == "swiglu" and not SHAPES[family].experts) or (
        family == "deepseek_v3"
    )
    assert texts(joined) == texts(plain)


def test_weights_are_views() -> None:
    model = copy.deepcopy(models("qwen2", 0)[1])
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    join(model)
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    attention = model.blocks["0"].attention
    assert isinstance(attention, JoinedAttention)
    with torch.no_grad():
        attention.k.weight.zero_()
        attention.k.bias.fill_(1.0)
    keys = attention.products(torch.ones(1, 1, SHAPES["qwen2"].hidden))[1]
    assert torch.equal(keys, torch.ones_like(keys))


@pytest.mark.parametrize("family", ["llama"])
def test_a_layer_that_is_more_than_a_product_stays(family: Family) -> None:
    model = copy.deepcopy(models(family, 0)[1])

    class Other(torch.nn.Linear):
        pass

    attention = model.blocks["0"].attention
    assert isinstance(attention, Attention)
    attention.k.__class__ = Other
    join(model)
    assert type(attention) is Attention
    assert type(model.blocks["1"].attention) is JoinedAttention
