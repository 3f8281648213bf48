"""Shape: the parameters and FLOPs that it counts are those of the model that is built from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from weft.checkpoint.stacked import stacked_parts
from weft.models.decoder import Decoder
from weft.models.parameters import block_sizes, is_stacked, parameter_sizes
from weft.models.places import EXPERT_FAMILIES, LATENT_FAMILIES
from weft.models.shape import FAMILY_SWITCHES, Experts, Latent, RopeScaling, Shape

SMALL: dict[str, Any] = {"num_layers": 2, "hidden": 32, "num_heads": 4, "ffn": 48, "vocab": 67, "max_seq": 64}
LATENT: dict[str, Any] = {"q_rank": 12, "kv_rank": 16, "nope_dim": 6, "rope_dim": 4, "value_dim": 10}


@st.composite
def mixtures(draw: st.DrawFn) -> Experts:
    num_experts = draw(st.integers(1, 5))
    return Experts(
        num_experts=num_experts,
        per_token=draw(st.integers(1, num_experts)),
        ffn=draw(st.integers(1, 20)),
        dense_layers=draw(st.integers(0, 2)),
        shared=draw(st.integers(0, 2)),
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
    )


@st.composite
def latents(draw: st.DrawFn) -> Latent:
    nope, rope = draw(st.integers(1, 8)), 2 * draw(st.integers(1, 4))
    return Latent(
        q_rank=draw(st.none() | st.integers(1, 9)),
        kv_rank=draw(st.integers(1, 9)),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=draw(st.integers(1, nope + rope)),
    )


def named_sizes(shape: Shape, model: Decoder) -> dict[str, tuple[int, ...]]:
    """Of a decoder's parameters, each expert's by its own name."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        parts = stacked_parts(shape, name) if is_stacked(name) else []
        sizes |= {region.name: region.sizes for region, _ in parts} or {name: tuple(parameter.shape)}
    return sizes


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.integers(1, 4))
    experts, latent = draw(st.none() | mixtures()), draw(st.none() | latents())
    plain, own = experts is None, latent is None
    return Shape(
        family=draw(st.sampled_from(sorted(FAMILY_SWITCHES))),
        num_layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 40)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (draw(st.integers(1, 3)) if own else 1),
        head_dim=2 * draw(st.integers(1, 8)) if latent is None else latent.nope_dim + latent.rope_dim,
        ffn=draw(st.integers(1, 50)),
        vocab=draw(st.integers(1, 99)),
        max_seq=draw(st.integers(1, 64)),
        tied=draw(st.booleans()),
        **{name: own and draw(st.booleans()) for name in ("qkv_bias", "qk_norm")},
        out_bias=plain and own and draw(st.booleans()),
        positions=draw(st.sampled_from(["rotary", "learned"])) if own else "rotary",
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])) if own else "rmsnorm",
        latent=latent,
        activation=draw(st.sampled_from(["swiglu", "gelu"])) if plain else "swiglu",
        experts=experts,
    )


@settings(deadline=None)  # the first example pays for torch
@given(shapes())
def test_counts_are_the_models(shape: Shape) -> None:
    with torch.device("meta"):
        model = Decoder(shape)
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    for index, block in enumerate(model.blocks.values()):
        assert shape.block_params(index) == sum(parameter.numel() for parameter in block.parameters())
    assert parameter_sizes(shape) == named_sizes(shape, model)
    for index in range(shape.num_layers):
        matrices = {name: dims for name, dims in block_sizes(shape, index).items() if len(dims) == 2}
        met = [rows * columns for name, (rows, columns) in matrices.items() if _meets(shape, name)]
        assert shape.block_matmul_params(index) == sum(met)


def _meets(shape: Shape, name: str) -> bool:
    """A token of the first `per_token` experts."""
    return ".experts." not in name or int(name.split(".")[2]) < (shape.experts.per_token if shape.experts else 0)


@settings(deadline=None)  # the first example pays for torch
@given(shapes(), st.data())
def test_stages_hold_what_the_whole_holds(shape: Shape, data: st.DataObject) -> None:
    """Every parameter lies in one of two stages, under its name of the whole; a tied head is a copy in the last."""
    edge = data.draw(st.integers(0, shape.num_layers))
    with torch.device("meta"):
        parts = [Decoder(shape, range(edge)), Decoder(shape, range(edge, shape.num_layers))]
    if edge in (0, shape.num_layers):
        return  # an empty stage: layouts refuse it
    names = [name for part in parts for name in named_sizes(shape, part)]
    copies = ["head.weight"] if shape.tied else []
    assert sorted(names) == sorted([*parameter_sizes(shape), *copies])


@pytest.mark.parametrize("family", sorted(FAMILY_SWITCHES))
@pytest.mark.parametrize("seq", [16, 64])
def test_flops_are_those_that_torch_counts(family: str, seq: int) -> None:
    """torch counts the matrix products of forward and backward, attention in full; so does `causal=False`."""
    experts = {"num_experts": 8, "per_token": 2, "dense_layers": 1} if family in EXPERT_FAMILIES else None
    latent = None
    if family in LATENT_FAMILIES:  # with values as wide as keys: to narrower ones zeros are added, which torch counts
        latent, experts = LATENT, {**(experts or {}), "shared": 1, "ffn": 24}
    kv_heads = 4 if family == "gpt2" or latent else 2
    shape = Shape(**{**SMALL, "family": family, "num_kv_heads": kv_heads, "experts": experts, "latent": latent})
    model = Decoder(shape)
    tokens = torch.zeros(2, seq, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(shape.flops_per_token(seq, causal=False), rel=0.02)


@pytest.mark.parametrize(("window", "seq"), [(None, 64), (64, 64), (100, 64), (8, 64), (1, 64), (16, 32)])
def test_causal_flops_are_the_scores_that_the_mask_keeps(window: int | None, seq: int) -> None:
    shape = Shape(**SMALL, sliding_window=window)
    scores = sum(min(token + 1, window or seq) for token in range(seq)) / seq  # a token, counted one by one
    whole, causal = (shape.flops_per_token(seq, causal=causal) for causal in (False, True))
    per_score, width = 12 * shape.num_layers * shape.num_heads * shape.head_dim, min(seq, window or seq)
    matmul = whole - per_score * width
    # the formula halves the square below the diagonal, and so half of the diagonal's scores too
    assert (causal - matmul) / per_score == pytest.approx(scores - width / (2 * seq))


def test_what_may_be_left_out() -> None:
    shape = Shape(**SMALL)
    assert (shape.num_kv_heads, shape.head_dim) == (4, 8)
    small = {name: size for name, size in SMALL.items() if name != "ffn"}
    assert Shape(**small, family="gpt2").ffn == 4 * 32
    with pytest.raises(ValidationError, match="ffn"):
        Shape(**small)  # no family but GPT-2 has a rule for it


@pytest.mark.parametrize("family", sorted(FAMILY_SWITCHES))
def test_a_family_sets_its_switches_and_they_may_be_set_again(family: Any) -> None:
    shape = Shape(**SMALL, family=family)
    for name, value in FAMILY_SWITCHES[family].items():
        assert getattr(shape, name) == value
    assert Shape(**SMALL, family=family, tied=not shape.tied).tied is not shape.tied


YARN = {"factor": 2, "original_max_seq": 32}
LLAMA3 = {"factor": 2, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq": 32}


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"num_layers": 0}, "model.num_layers is 0; it must be at least 1"),
        ({"hidden": 0, "head_dim": 8}, "model.hidden is 0"),
        ({"num_heads": 0, "num_kv_heads": 1}, "model.num_heads is 0"),
        ({"vocab": -1}, "model.vocab is -1"),
        ({"max_seq": 0}, "model.max_seq is 0"),
        ({"num_kv_heads": 3}, "model.num_kv_heads .3. must divide model.num_heads .4."),
        ({"head_dim": 7}, "model.head_dim .7. must be even"),
        ({"sliding_window": 0}, "model.sliding_window is 0; leave it out"),
        ({"family": "mamba"}, "gpt2"),
        ({"depth": 3}, "depth"),
        ({"activation": "relu"}, "swiglu"),
        ({"num_layers": 2.5}, "num_layers"),
        ({"experts": {"num_experts": 2, "per_token": 3}}, "model.experts.per_token .3. is more than"),
        ({"experts": {"num_experts": 2, "per_token": 0}}, "per_token"),
        ({"experts": {"num_experts": 2, "per_token": 1}, "out_bias": True}, "model.experts are computed with"),
        (
            {"experts": {"num_experts": 6, "per_token": 1, "groups": 4}},
            "model.experts.groups .4. must divide num_experts",
        ),
        ({"experts": {"num_experts": 6, "per_token": 1, "top_groups": 2}}, "top_groups .2. be no more"),
        ({"experts": {"num_experts": 8, "per_token": 3, "groups": 4}}, "have to hold per_token .3."),
        ({"experts": {"num_experts": 4, "per_token": 1, "groups": 4}}, "each of 4 has 1 experts"),
        ({"latent": {**LATENT, "rope_dim": 3}}, "model.latent.rope_dim .3. must be even"),
        ({"latent": {**LATENT, "value_dim": 11}}, "model.latent.value_dim .11. is more than nope_dim"),
        ({"latent": LATENT, "head_dim": 8}, "model.head_dim .8. is nope_dim . rope_dim"),
        ({"latent": LATENT, "num_kv_heads": 2}, "model.num_kv_heads .2.: with model.latent every head has its own"),
        ({"latent": LATENT, "qk_norm": True}, "model.latent is attention with rotary positions"),
        ({"yarn": YARN, "rope_scaling": LLAMA3}, "model.yarn and model.rope_scaling both stretch"),
    ],
)
def test_shapes_that_are_none(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Shape(**{**SMALL, **over})


def test_odd_heads_are_fine_without_rotary_positions() -> None:
    assert Shape(**{**SMALL, "family": "gpt2", "head_dim": 7}).head_dim == 7


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Shape(**SMALL).hidden = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq=64, kind="yarn")  # type: ignore[call-arg]
