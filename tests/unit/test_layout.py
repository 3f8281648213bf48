"""Layouts: their text form, how they share out blocks and sequences, and what they refuse."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from weft.config.layout import Layout
from weft.models.shape import Experts, Shape

WAYS = st.integers(1, 12)


def shape(**over: Any) -> Shape:
    return Shape(**{"num_layers": 4, "hidden": 32, "num_heads": 8, "num_kv_heads": 4, "ffn": 48, "vocab": 67,
                    "max_seq": 32, **over})  # fmt: skip


def refused(words: str, layout: str, batch: int = 8, seq: int = 16, **over: Any) -> None:
    cut = Layout.parse(layout)
    with pytest.raises(ValueError, match=words):
        cut.check(shape(**over), batch, seq)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    compiled = draw(st.booleans())
    precision = draw(st.sampled_from(["fp32", "bf16", "fp16", "fp8", "fp8row"]))
    fields = {axis: draw(WAYS) for axis in ("dp", "fsdp", "cp", "tp", "pp")}
    experts = {"ep": fields["cp"], "etp": fields["tp"]}  # always fits
    return Layout(
        **fields,
        **draw(st.sampled_from([{}, experts])),
        cp_kind=draw(st.sampled_from(["allgather", "ring", "ulysses"])) if fields["cp"] > 1 else "allgather",
        zero=draw(st.sampled_from([1, 2, 3])) if fields["fsdp"] > 1 else 3,
        sp=draw(st.booleans()) and fields["tp"] > 1,
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])) if fields["pp"] > 1 else "1f1b",
        stages=draw(st.one_of(st.just(()), st.tuples(*[st.integers(1, 40)] * fields["pp"]))),
        micro_batch=draw(st.none() | st.integers(1, 64)),
        recompute=draw(st.sampled_from(["none", "selective", "full/2", "keep-network:3", "redo-mlp", "fit40g"])),
        offload=draw(st.booleans()) and not compiled,
        offload_weights=draw(st.booleans()) and (fields["fsdp"] > 1 or precision != "fp32"),
        loss=draw(st.sampled_from(["whole", "chunked"])),
        precision=precision,
        gradients=draw(st.sampled_from(["fp32", "bf16"])) if precision in ("bf16", "fp8", "fp8row") else "fp32",
        compile=compiled,
    )


# -- text form --------------------------------------------------------------------------------------------------------


@given(layouts())
def test_text_and_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@given(layouts(), st.randoms())
def test_parts_may_stand_in_any_order(layout: Layout, random: Any) -> None:
    parts = str(layout).split(".")
    random.shuffle(parts)
    assert Layout.parse(".".join(parts)) == layout


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("single", "single"), (" dp2 ", "dp2"), ("dp1", "single"), ("tp2.1f1b.fp32", "tp2"), ("zero3.fsdp2", "fsdp2"),
        ("bf16.sp.tp2.dp2", "dp2.tp2.sp.bf16"), ("single.bf16", "bf16"),
        ("pp2.stages3-1.gpipe.mb2.full.fp16.compile", "pp2.stages3-1.gpipe.mb2.full.fp16.compile"),
    ],
)  # fmt: skip
def test_text_is_normalised(text: str, same: str) -> None:
    assert str(Layout.parse(text)) == same


@pytest.mark.parametrize(
    "text", ["", "tp", "2", "tp2x", "tp-2", "tp2,dp2", "xp2", "stages", "stages2-", "TP2", "tp2..sp"]
)
def test_text_that_is_not_understood(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not understood. Parts, joined by dots: dp2"):
        Layout.parse(text)


@pytest.mark.parametrize(("text", "name"), [("tp2.tp4", "tp"), ("bf16.fp16", "precision"), ("mb1.mb2", "micro_batch")])
def test_nothing_is_set_twice(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"sets {name} twice"):
        Layout.parse(text)


# -- sizes ------------------------------------------------------------------------------------------------------------


@given(layouts())
def test_world_is_the_product_of_the_axes(layout: Layout) -> None:
    assert layout.world == layout.dp * layout.fsdp * layout.cp * layout.tp * layout.pp
    assert layout.replicas == layout.dp * layout.fsdp


@given(num_layers=st.integers(1, 200), pp=st.integers(1, 64))
def test_stages_are_even_and_whole(num_layers: int, pp: int) -> None:
    assume(pp <= num_layers)
    stages = Layout(pp=pp).stage_blocks(shape(num_layers=num_layers))
    assert list(itertools.chain(*stages)) == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # the last stage has the head to do as well


def test_a_large_head_takes_blocks_away() -> None:
    large = shape(num_layers=12, vocab=2 * shape().block_matmul_params(0) // 32)  # a head like two blocks
    assert [len(stage) for stage in Layout.parse("pp2").stage_blocks(large)] == [7, 5]
    assert [len(stage) for stage in Layout.parse("pp2.zbv").stage_blocks(large)] == [4, 4, 3, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_stages_as_given(sizes: list[int]) -> None:
    stages = Layout(pp=len(sizes), stages=tuple(sizes)).stage_blocks(shape(num_layers=sum(sizes)))
    assert [len(stage) for stage in stages] == sizes
    assert list(itertools.chain(*stages)) == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("layout", "batch", "size", "count"),
    [
        ("single", 8, 8, 1),  # all at once
        ("mb2", 8, 2, 4),
        ("dp2", 8, 4, 1),
        ("dp2.fsdp2.mb1", 8, 1, 2),
        ("pp2", 8, 2, 4),  # 2·pp passes
        ("pp2", 2, 1, 2),
        ("pp2", 6, 1, 6),  # 4 does not divide 6: the next that does
        ("pp4.dp2", 64, 4, 8),
        ("pp2.mb4", 8, 4, 2),
    ],
)
def test_micro_batches(layout: str, batch: int, size: int, count: int) -> None:
    cut = Layout.parse(layout)
    assert (cut.micro_batch_size(batch), cut.num_micro_batches(batch)) == (size, count)


@given(layouts(), st.integers(1, 300))
def test_accepted_micro_batches_cover_the_batch(layout: Layout, batch: int) -> None:
    assume(not layout.precision.startswith("fp8") or sum(layout.stages or (3,)) >= 3)  # two blocks stay in bf16
    fits = shape(num_layers=sum(layout.stages) or 12, num_heads=27720**2, num_kv_heads=27720**2, head_dim=2, ffn=27720)
    if layout.ep > 1 or layout.etp is not None:
        layout = layout.model_copy(update={"compile": False})
        fits = fits.model_copy(update={"experts": Experts(num_experts=27720, per_token=1, ffn=27720)})
    try:
        layout.check(fits, batch, 2 * 27720**2)
    except ValueError as error:
        assert re.search("train.global_batch|micro|sides are multiples", str(error))  # noqa: PT017
        return
    size, count = layout.micro_batch_size(batch), layout.num_micro_batches(batch)
    assert size * count * layout.replicas == batch
    assert layout.schedule == "gpipe" or layout.pp == 1 or count >= layout.pp


@given(layouts())
def test_every_process_holds_weights_and_experts(layout: Layout) -> None:
    for (copies, shards), ways in ((layout.weight_ways, layout.tp), (layout.expert_ways, layout.ep * layout.expert_tp)):
        assert copies * shards * ways * layout.pp == layout.world
        assert shards == 1 or layout.fsdp > 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sp": True}, "layout.sp .*layout.tp above 1"),
        ({"zero": 1}, "layout.zero = 1 .*layout.fsdp above 1"),
        ({"zero": 2, "dp": 4}, "layout.zero = 2 .*layout.fsdp above 1"),
        ({"schedule": "gpipe"}, "layout.schedule = gpipe .*layout.pp above 1"),
        ({"schedule": "zb", "pp": 2}, "layout.schedule = zb is none of gpipe, 1f1b, .*and no .csv file"),
        ({"schedule": "bfs", "pp": 2}, "layout.schedule = bfs .*layout.vp above 1"),
        ({"schedule": "zbv", "pp": 2, "vp": 3}, "layout.vp = 3: zbv has 2 stages"),
        ({"vp": 2, "pp": 2}, "layout.vp = 2: 1f1b has one stage.*interleaved or bfs"),
        ({"vp": 2}, "layout.vp = 2 .*layout.pp above 1"),
        ({"pp": 2, "stages": (4,)}, "layout.stages lists 1 stages and layout.pp is 2"),
        ({"stages": (2, 2)}, "layout.stages lists 2 stages and layout.pp is 1"),
        ({"pp": 2, "stages": (4, 0)}, "layout.stages = .4, 0.: every stage needs at least one block"),
        ({"dp": 0}, "greater than or equal to 1"),
        ({"micro_batch": 0}, "greater than or equal to 1"),
        ({"zero": 4}, "1, 2 or 3"),
        ({"ep": 2}, "layout.ep·etp = 2 must divide fsdp·cp·tp = 1"),
        ({"ep": 3, "fsdp": 2, "dp": 3}, "layout.ep·etp = 3 must divide"),
        ({"cp_kind": "ring"}, "set layout.cp above 1"),
        ({"offload": True, "compile": True}, "layout.offload .*compiled.*leave one out"),
        ({"dp": 2, "offload_weights": True}, "layout.offload_weights .*set layout.fsdp above 1 or"),
        ({"gradients": "bf16"}, "layout.gradients = bf16 .*set layout.precision = bf16"),
        ({"xp": 2}, "Extra inputs"),
    ],
)
def test_impossible_by_themselves(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Layout(**fields)


def test_what_tp_must_divide() -> None:
    refused("layout.tp = 3 does not divide model.num_heads = 8", "tp3")
    refused("layout.tp = 8 does not divide model.num_kv_heads = 4", "tp8")
    refused("layout.tp = 4 does not divide model.ffn = 50", "tp4", ffn=50)
    refused("layout.tp = 4 is more than model.vocab = 3", "tp4", vocab=3)
    Layout.parse("tp4").check(shape(), 8, 15)  # the vocabulary, 67, need not divide; nor the sequence, without sp


def test_what_cp_must_divide() -> None:
    refused("layout.cp = 4 cuts the sequence into 2·cp parts.*train.seq = 20", "cp4", seq=20)
    refused("layout.cp_kind = ulysses .*layout.cp = 4.*2 kv heads.*allgather or ring", "cp4.ulysses.tp2", seq=64)
    Layout.parse("cp4.ring.tp2").check(shape(), 8, 16)


def test_what_sp_must_divide() -> None:
    refused("layout.sp .*4 ways.*train.seq = 18", "tp4.sp", seq=18)
    Layout.parse("tp4.sp").check(shape(), 8, 20)


def test_what_pp_needs() -> None:
    refused("layout.pp = 5 stages need as many blocks; model.num_layers = 4", "pp5", batch=16)
    refused("layout.stages = .1, 2. adds up to 3 blocks; model.num_layers = 4", "pp2.stages1-2")
    refused("1f1b needs as many micro-batches as stages.*there are 2.*layout.pp = 4.*layout.micro_batch", "pp4.mb4")
    refused("1f1b needs .*layout.pp = 4.*gpipe", "pp4", batch=2)
    Layout.parse("pp4.mb4.gpipe").check(shape(), 8, 16)


def test_what_schedules_need() -> None:
    refused("layout.pp·vp = 6 stages need as many blocks", "pp2.vp3.interleaved", num_layers=5)
    refused("interleaved works in rounds of 2.*3 are no whole rounds.*layout.micro_batch", "pp2.vp2.interleaved.mb1", 3)
    refused("dualpipev needs twice as many.*there are 2", "pp2.dualpipev.mb4")
    refused("layout.schedule = none.csv: No such file", "pp2.csv(none.csv)")


def test_what_fp8_needs() -> None:
    sizes = {"ffn": 64, "num_kv_heads": 8}
    refused("layout.precision = fp8 .*sides are multiples of 16: model.ffn / layout.tp = 24", "tp2.fp8", num_kv_heads=8)
    refused("multiples of 16: model.num_heads · head_dim / layout.tp = 8", "tp4.fp8row", **sizes)
    refused("multiples of 16: the tokens of a pass.* = 8", "mb1.fp8", seq=8, **sizes)
    refused("layout.precision = fp8 leaves the first and the last block in bf16", "fp8", num_layers=2)
    Layout.parse("tp2.fp8").check(shape(**sizes), 8, 16)
    Layout.parse("pp2.zbh1.fp8").check(shape(**sizes), 8, 16)


def test_what_the_batch_must_be() -> None:
    refused("train.global_batch = 8 is not a multiple of dp·fsdp = 6.*layout.dp or layout.fsdp", "dp3.fsdp2")
    refused("train.global_batch = 8 is not a multiple of dp·fsdp = 16", "dp16")
    refused("layout.micro_batch = 3 does not divide the 4 sequences that each replica has", "dp2.mb3")
    refused("layout.micro_batch = 8 does not divide the 4 sequences", "dp2.mb8")


def test_every_refusal_names_a_setting() -> None:
    """Over all small layouts: accepted, or refused by a message that names what to change."""
    for dp, tp, pp, batch in itertools.product((1, 2, 3), (1, 2, 3, 16), (1, 2, 5), (1, 6, 8)):
        try:
            Layout(dp=dp, tp=tp, pp=pp).check(shape(), batch, 16)
        except ValueError as error:
            assert "layout." in str(error), str(error)  # noqa: PT017


def test_a_number_that_cannot_be_is_told_with_its_field() -> None:
    with pytest.raises(
        ValueError, match=r"layout 'fsdp8\.mb0': micro_batch: Input should be greater than or equal to 1"
    ):
        Layout.parse("fsdp8.mb0")
