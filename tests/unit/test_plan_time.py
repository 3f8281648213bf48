"""The planner's models against cases that others worked out or measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan import collectives
from weft.plan.footprint import block_activations, footprint
from weft.plan.gemm import gemm_time
from weft.plan.machine import cluster_names, read_cluster
from weft.plan.numbers import MEGATRON, Job, numbers
from weft.plan.time import step_time
from weft.plan.work import Software, Work, stack

A100 = read_cluster("a100-80gb")
GPT3 = Shape(
    family="llama", num_layers=96, hidden=12288, num_heads=96, ffn=49152, vocab=51200, max_seq=2048, activation="gelu"
)
TRILLION = GPT3.model_copy(
    update={"num_layers": 128, "hidden": 25600, "num_heads": 160, "num_kv_heads": 160, "head_dim": 160, "ffn": 102400}
)
OLD = Software(flash=0, overlap_dp=0, dropout=1, reduced=2)


def work(shape: Shape, layout: str, batch: int, software: Software = MEGATRON, seq: int = 2048) -> Work:
    return numbers(shape, Layout.parse(layout), Job(seq=seq, global_batch=batch), A100, software)


@pytest.mark.parametrize(
    ("layout", "bytes_of"),
    [
        ("mb1.bf16", lambda s, b, h, a, t: s * b * h * (34 + 5 * a * s / h)),
        ("tp8.mb1.bf16", lambda s, b, h, a, t: s * b * h * (10 + 24 / t + 5 * a * s / (h * t))),
        ("tp8.sp.mb1.bf16", lambda s, b, h, a, t: s * b * h / t * (34 + 5 * a * s / h)),
        ("tp8.sp.mb1.selective.bf16", lambda s, b, h, a, t: 34 * s * b * h / t),
    ],
)
def test_activations_are_those_of_korthikanti(layout: str, bytes_of) -> None:
    """Reducing Activation Recomputation, 2022, table 2, for GPT-3 175B."""
    t = Layout.parse(layout).tp
    assert block_activations(work(GPT3, layout, 1, OLD)) == pytest.approx(bytes_of(2048, 1, 12288, 96, t), rel=0.06)


@pytest.mark.parametrize(
    ("layout", "per_parameter"),
    [("dp8", 16), ("fsdp8.zero1", 4 + 12 / 8), ("fsdp8.zero2", 2 + 14 / 8), ("fsdp8", 16 / 8)],
)
def test_states_are_those_of_zero(layout: str, per_parameter: float) -> None:
    """Rajbhandari et al., ZeRO, 2020, figure 1: 16 bytes for each parameter with mixed precision."""
    held = footprint(work(GPT3, layout + ".mb1.bf16", 8, Software(gradients=2)))
    states = held.weights + held.gradients + held.optimizer
    assert states / GPT3.num_params == pytest.approx(per_parameter, rel=0.01)


def test_megatron_trains_a_trillion_parameters() -> None:
    """Narayanan et al., 2021, table 1: 163 TFLOP/s of 3,072 A100s, 102.7 s a step. Korthikanti: 94.4 and 71.5 s on 512."""
    full = step_time(work(TRILLION, "dp6.tp8.pp64.mb1.full.bf16", 3072, OLD)).total
    assert full == pytest.approx(102.7, rel=0.08)
    assert step_time(work(TRILLION, "tp8.pp64.mb1.full.bf16", 512, OLD)).total == pytest.approx(94.4, rel=0.08)
    selective = step_time(work(TRILLION, "tp8.sp.pp64.mb1.selective.bf16", 512, OLD)).total
    assert selective == pytest.approx(71.5, rel=0.08)


def test_bubble_is_that_of_the_schedule() -> None:
    """(p - 1) / m of the computation under 1f1b; interleaved, v times less (Narayanan et al., 2021, 2.2)."""
    plain, interleaved = (
        step_time(work(GPT3, text, 64, MEGATRON)) for text in ("pp8.mb1.bf16", "pp8.vp4.interleaved.mb1.bf16")
    )
    busy = plain.matmul + plain.attention + plain.elementwise
    assert plain.bubble / busy == pytest.approx(7 / 64, rel=0.1)
    assert interleaved.bubble == pytest.approx(plain.bubble / 4, rel=0.02)


def test_time_adds_up_and_columns_are_the_same_as_single_ones() -> None:
    works = [work(GPT3, text, 64) for text in ("tp8.sp.pp8.mb1.bf16", "fsdp64.mb1.full.bf16", "dp8.tp8.mb2.bf16")]
    together = step_time(stack(works)).total
    assert np.allclose(together, [step_time(one).total for one in works])
    assert np.allclose(footprint(stack(works)).total, [footprint(one).total for one in works])


def test_no_product_is_faster_than_the_best() -> None:
    chip = A100.machine()
    sizes = 2.0 ** np.arange(6, 15)
    seconds = gemm_time(sizes, sizes, sizes, chip.peak * chip.gemm, chip.sms, chip.hbm, 2)
    rate = 2 * sizes**3 / seconds / chip.peak
    assert (np.diff(rate) > 0).all()
    assert 0.7 * chip.gemm < rate[-1] < chip.gemm
    assert rate[0] < 0.01  # launching it takes longer


def test_wave_quantization() -> None:
    """One tile more than a wave costs more than a tile: the shape matters."""
    chip = A100.machine()
    one, more = (gemm_time(m, 128 * 108, 8192, 2.7e14, chip.sms, chip.hbm, 2) for m in (256, 256 + 1))
    assert more > 1.2 * one


def test_a_ring_moves_each_byte_once() -> None:
    """All-gather: (n - 1)/n of the bytes over the bus; over nodes the adapters bound it."""
    chip = A100.machine()
    inside = collectives.gather(8, 1, chip, 8e9)
    assert 8e9 * 7 / 8 / chip.nvlink < inside < 1.4 * 8e9 * 7 / 8 / chip.nvlink
    assert collectives.gather(16, 8, chip, 8e9) > 8 * inside  # each member alone in its node
    assert collectives.gather(1, 1, chip, 8e9) == 0


def test_slower_links_and_more_recompute_cost() -> None:
    base = work(GPT3, "fsdp8.zero1.tp8.sp.pp8.mb1.bf16", 64)
    slow = replace(
        base, machine=replace(base.machine, network=base.machine.network / 4, nvlink=base.machine.nvlink / 4)
    )
    assert step_time(slow).total > 1.05 * step_time(base).total
    again = work(GPT3, "fsdp8.zero1.tp8.sp.pp8.mb1.full.bf16", 64)
    assert 1.2 < step_time(again).total / step_time(base).total < 1.4
    assert footprint(again).total < footprint(base).total


def test_every_cluster_is_read_and_a_wrong_one_named(tmp_path) -> None:
    for name in cluster_names():
        assert read_cluster(f"{name}x64").gpus == 64
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        read_cluster("h10")
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "h100"\nnetwork_gb_per_s = 12.5\n')
    assert read_cluster(str(mine), 16).network_gb_per_s == 12.5
    mine.write_text('base = "h100"\nnetwork = 12.5\n')
    with pytest.raises(ValueError, match="network: Extra inputs"):
        read_cluster(str(mine))
