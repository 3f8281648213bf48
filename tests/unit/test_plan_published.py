"""The planner's formulas against published ones: activations, bytes of ZeRO, Megatron's run of 10^12 parameters."""

from __future__ import annotations

import pytest

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.models.shape import Shape
from weft.plan.machine import read_cluster
from weft.plan.memory.activations import Pass
from weft.plan.memory.footprint import footprint
from weft.plan.memory.moments import layout_memory
from weft.plan.memory.stage import stages
from weft.plan.numbers import MEGATRON, Job, numbers
from weft.plan.time.block import parameters as counted
from weft.plan.work import Software

# Korthikanti et al. 2022, table 3: heads, hidden, layers, sequences of a micro-batch; s = 2,048, tp = 8
KORTHIKANTI = {
    "22B": (64, 6144, 48, 4),
    "175B": (96, 12288, 96, 1),
    "530B": (128, 20480, 105, 1),
    "1T": (160, 25600, 128, 1),
}
SEQ, TP = 2048, 8


def gpt(name: str) -> Shape:
    heads, hidden, layers, _ = KORTHIKANTI[name]
    return Shape(family="gpt2", num_layers=layers, hidden=hidden, num_heads=heads, vocab=51200, max_seq=SEQ)


def block(name: str, layout: str) -> tuple[float, float]:
    """Bytes that a block keeps, over s·b·h: of all, and of what the paper leaves out: statistics of norms and softmax."""
    shape, batch = gpt(name), KORTHIKANTI[name][3]
    one = Pass.of(shape, Layout.parse(layout), batch, SEQ)
    unit = SEQ * batch * shape.hidden
    kept = one.kept if "full" in layout else one.block
    left_out = 0 if "full" in layout else 2 * one.statistics + one.head_statistics
    return (kept - left_out) / unit, left_out / unit


MASKS = 2.0
"""s·b·h of dropout's masks in a block, of the paper's 34: attention's and the MLP's. There is no dropout here."""


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_activations_of_a_block_are_korthikantis(name: str) -> None:
    """Table 2 of the paper; attention's scores are never there, as with its selective recomputation."""
    kept, left_out = block(name, "bf16")
    assert kept == 34 - MASKS
    assert left_out < 0.05
    assert block(name, f"tp{TP}.bf16")[0] == 10 + 24 / TP - MASKS
    # the paper gathers what enters a region again in backward; here it is kept: two inputs of 2 sbh
    gathered = 4 * (1 - 1 / TP)
    assert block(name, f"tp{TP}.sp.bf16")[0] == 34 / TP - MASKS / TP + gathered
    assert block(name, f"tp{TP}.full.bf16")[0] == 2


@pytest.mark.parametrize(("name", "both", "full"), [("22B", 16, 8), ("175B", 19, 9), ("530B", 20, 9), ("1T", 20, 9)])
def test_shares_of_the_papers_baseline(name: str, both: int, full: int) -> None:
    """Per cent of what tp alone keeps, scores and all, as read off its figure 7: whole numbers."""
    heads, hidden, *_ = KORTHIKANTI[name]
    baseline = 10 + 24 / TP + 5 * heads * SEQ / (hidden * TP)
    ours = block(name, f"tp{TP}.sp.bf16")[0] - 4 * (1 - 1 / TP) + MASKS / TP
    assert round(100 * ours / baseline) == pytest.approx(both, abs=1)
    assert round(100 * block(name, f"tp{TP}.full.bf16")[0] / baseline) == pytest.approx(full, abs=1)


ZERO = Software(weights=2, gradients=2, master=4, moments=8)
"""Mixed precision as Rajbhandari et al. 2020, section 3.1 count it: 16 bytes a parameter."""


@pytest.mark.parametrize(
    ("zero", "software", "expected"),
    [
        (1, ZERO, lambda d: 4 + 12 / d),
        (2, ZERO, lambda d: 2 + 14 / d),
        (3, ZERO, lambda d: 16 / d),
        (1, MEGATRON, lambda d: 6 + 12 / d),  # Megatron-LM, dist_optimizer.md: bf16 with fp32 gradients
    ],
    ids=["1", "2", "3", "megatron"],
)
@pytest.mark.parametrize("ways", [8, 64])
def test_bytes_of_a_parameter_under_zero(zero: int, software: Software, expected, ways: int) -> None:  # type: ignore[no-untyped-def]
    layout = Layout(fsdp=ways, zero=zero, precision="bf16")
    work = numbers(gpt("22B"), layout, Job(seq=SEQ, global_batch=ways), read_cluster("h100x64"), software)
    found = footprint(work)
    common, experts, table = counted(work)
    params = work.sizes.layers * (common + experts) + table + work.sizes.positions * work.sizes.hidden
    assert params == pytest.approx(gpt("22B").num_params, rel=1e-3)
    held = float(found.weights + found.gradients + found.optimizer)
    assert held / float(params) == pytest.approx(expected(ways), rel=1e-6)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_wefts_own_bytes_of_a_parameter(zero: int) -> None:
    """fp32 weights, gradients and moments, all of them sharded; below ZeRO-3 the bf16 copy stays gathered."""
    config = make_config(
        {"model": "gpt2-124m", "layout": {"fsdp": 8, "zero": zero, "precision": "bf16"},
         "train": {"global_batch": 8, "seq": 128}}
    )  # fmt: skip
    [found] = layout_memory(config, "cuda")
    update = next(moment for moment in found.moments if moment.moment == "update")
    params = found.stage.params
    assert (update.weights + update.optimizer + update.gradients) / params == pytest.approx(16 / 8, rel=2e-3)
    first = next(moment for moment in found.moments if moment.moment == "end of the forward pass")
    assert (first.copies == 2 * params) is (zero < 3)


def test_megatrons_run_of_a_trillion() -> None:
    """Narayanan et al. 2021, table 1, equations 2 and 4: 1,008 billion parameters, tp 8 and pp 64, 3,072 GPUs."""
    shape = gpt("1T")
    h, layers, v = shape.hidden, shape.num_layers, shape.vocab
    assert shape.num_params == pytest.approx(
        12 * layers * h**2 * (1 + 13 / (12 * h) + (v + SEQ) / (12 * layers * h)), rel=1e-5
    )
    assert round(shape.num_params / 1e9) == 1008
    head = 6 * v * h
    forward_again = 4 / 3 * (shape.flops_per_token(SEQ, causal=False) - head) + head
    equation = 96 * layers * h**2 * (1 + SEQ / (6 * h) + v / (16 * layers * h))
    assert forward_again == pytest.approx(equation, rel=1e-12)
    days = 450e9 * forward_again / (3072 * 163e12) / 86400
    assert days == pytest.approx(84, rel=0.05)  # the paper's own, from 8·T·P

    layout = Layout(tp=8, pp=64, dp=6, stages=(2,) * 64, precision="bf16")
    assert layout.world == 3072
    middle = stages(shape, layout)[1]
    cut, whole = 12 * h**2 + 7 * h, 6 * h  # of a block: matrices and the biases cut with them; norms and other biases
    assert middle.params == 2 * (cut // 8 + whole)
