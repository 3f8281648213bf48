"""Matrices of one input as one matrix: the same texts, and no weight twice."""

from __future__ import annotations

import copy

import torch
from test_engine import SHAPES, families, outputs_of, random_prompts

from weft.models.attention import Attention
from weft.models.decoder import Decoder
from weft.models.mlp import SwigluMLP
from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.kernels.joined import JoinedAttention, JoinedSwigluMLP, join
from weft.serve.requests.request import Request, Sampling


def fresh(family: Family) -> Decoder:
    """Weights of its own: whoever is served on a CPU has products of his own from then on."""
    model = Decoder(SHAPES[family]).requires_grad_(False).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return model


def texts(model: Decoder) -> dict:
    engine = Engine(model, None, EngineConfig(max_sequences=6, step_tokens=32, block_tokens=4))
    for number, prompt in enumerate(random_prompts(5, 30, 2, 9)):
        engine.add(Request(str(number), prompt, Sampling(max_tokens=8)))
    return {key: [output.tokens for output in outputs] for key, outputs in outputs_of(engine).items()}


@families
def test_texts_are_the_same(family: Family) -> None:
    plain = fresh(family)
    joined = copy.deepcopy(plain)
    join(joined)
    kinds = {type(module) for module in joined.modules()}
    assert Attention not in kinds
    assert SwigluMLP not in kinds
    assert (JoinedAttention in kinds) == (SHAPES[family].latent is None)
    assert (JoinedSwigluMLP in kinds) == (family not in ("gpt2", "mixtral", "qwen3_moe"))
    assert texts(joined) == texts(plain)


def test_weights_are_views() -> None:
    model = fresh("qwen2")
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


def test_a_layer_that_is_more_than_a_product_stays() -> None:
    model = fresh("llama")

    class Other(torch.nn.Linear):
        pass

    attention = model.blocks["0"].attention
    assert isinstance(attention, Attention)
    attention.k.__class__ = Other
    join(model)
    assert type(attention) is Attention
    assert type(model.blocks["1"].attention) is JoinedAttention
