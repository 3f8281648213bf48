"""The planner's models against cases that others worked out or measured."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.columns import stack
from weft.plan.machine import cluster_names, read_cluster
from weft.plan.memory.footprint import footprint
from weft.plan.memory.kept import block_activations
from weft.plan.numbers import MEGATRON, WEFT, Job, flying, numbers
from weft.plan.search import search
from weft.plan.time import collectives
from weft.plan.time.block import Passes
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.gemm import gemm_time
from weft.plan.time.step import evened, step_time, waiting
from weft.plan.work import Software, Work
from weft.presets import preset_shape
from weft.schedules.orders import make_schedule
from weft.schedules.table import LOOPED, Op, Schedule
from weft.schedules.timeline import Costs, timeline

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


def test_zbh1_waits_as_zero_bubble_measured() -> None:
    """Qi et al., 2023, table 5: from the times that they measured of 6.2B, 24 micro-batches, ZB-1p waits half as long as
    1f1b (0.1323/0.8677 of 0.2347/0.7653); and its formula, F + B - W where 1f1b waits F + B + W."""
    six = GPT3.model_copy(
        update={"num_layers": 32, "hidden": 4096, "num_heads": 32, "num_kv_heads": 32, "ffn": 16384, "vocab": 32000}
    )
    old = replace(OLD, gradients=2)
    plain, zero = (step_time(work(six, text, 72, old, seq=1024)) for text in ("pp8.mb3.fp16", "pp8.zbh1.mb3.fp16"))
    assert zero.bubble / plain.bubble == pytest.approx(0.497, rel=0.12)
    assert zero.total - zero.bubble == pytest.approx(plain.total - plain.bubble, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1f1b", 1), ("gpipe", 1), ("interleaved", 3), ("bfs", 2), ("bfs", 3), ("zbh1", 1), ("zbv", 2), ("dualpipev", 2)],
)
def test_pipelines_wait_as_their_tables_do(schedule: str, chunks: int) -> None:
    """Of stages that are alike: loops to the last digit, what puts gradients off within 5 % of a step, 1 in the mean."""
    off = []
    for pp, count, costs in product((2, 4, 8), (1, 3, 4, 6, 8, 12, 16, 32), ((1, 1, 1), (1, 1.3, 0.8), (1, 2, 0.9))):
        try:
            line = timeline(make_schedule(schedule, pp, chunks, count), Costs(*costs))
        except ValueError:
            continue  # rounds of pp, or at least as many
        text = f"pp{pp}" + (f".vp{chunks}" if schedule in LOOPED else "") + f".{schedule}.mb1.bf16"
        alike = work(GPT3, text, count, MEGATRON)
        waited = waiting(alike, *(chunks * cost for cost in costs))
        off.append(abs(float(waited) - (line.length - count * chunks * sum(costs))) / line.length)
    assert len(off) >= 20
    if schedule in ("zbh1", "zbv", "dualpipev"):
        assert max(off) < 0.05
        assert np.mean(off) < 0.01
    else:
        assert max(off) < 1e-9


def over(schedule: Schedule, flow: float) -> float:
    """When all is done, if what comes from another process is so long on its way, and nobody stops for it."""
    ends: dict[Op, float] = {}
    free = [0.0] * len(schedule.orders)
    rows = enumerate(timeline(schedule).spans)
    begun = sorted((start, op, rank) for rank, row in rows for op, start, _ in row)  # what is needed has begun before
    home = {op: rank for _, op, rank in begun}
    for _, op, rank in begun:
        came = (ends[need] + flow * (home[need] != rank) for need in schedule.needs(op))
        free[rank] = ends[op] = max([free[rank], *came]) + Costs().of(op, schedule)
    return max(free)


@pytest.mark.parametrize(
    ("schedule", "pp", "chunks", "count"),
    [
        ("interleaved", 4, 2, 8),
        ("interleaved", 8, 4, 16),
        ("interleaved", 4, 4, 32),
        ("bfs", 4, 4, 4),
        ("bfs", 4, 4, 16),
    ],
)
def test_each_loop_of_a_pipeline_waits_for_the_first_message(schedule: str, pp: int, chunks: int, count: int) -> None:
    """Though others are hidden: in rounds of as many micro-batches as processes the first comes back as the last goes."""
    flow = 0.01
    table = make_schedule(schedule, pp, chunks, count)
    later = (over(table, flow) - over(table, 0)) / flow
    plan = work(GPT3, f"pp{pp}.vp{chunks}.{schedule}.mb1.bf16", count, replace(MEGATRON, overlap_pp=1))
    sent = float(collectives.send(1, plan.machine, plan.tokens * GPT3.hidden * 2))
    hidden = 2 * count * chunks * 0.4 * C.pp_exposed  # of which a part shows
    assert step_time(plan).pp / sent == pytest.approx(later + hidden)


@pytest.mark.parametrize("model", ["gpt2-124m", "llama3-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize(
    "rate", ["peak_tflops", "memory_gb_per_s", "nvlink_gb_per_s", "network_gb_per_s", "host_gb_per_s"]
)
def test_with_half_of_a_rate_no_step_is_faster(model: str, rate: str) -> None:
    """What waits for one thing hides the messages of others no more than once: launches, the CPU's memory, replicas."""
    shape, job, cluster = preset_shape(model), Job(seq=1024, global_batch=64), read_cluster("h100x32")
    half = cluster.model_copy(update={rate: getattr(cluster, rate) / 2})
    found = search(shape, job, cluster)
    layouts = []
    for index in range(0, len(found), 1 + len(found) // 200):
        try:
            layouts.append(found.layout(index))
        except ValueError:
            continue  # which weft does not run
    whole, less = (
        step_time(stack([numbers(shape, layout, job, one) for layout in layouts])).total for one in (cluster, half)
    )
    slower = less / whole
    assert slower.max() > 1.01 or rate == "host_gb_per_s"
    assert slower.min() > 0.97, layouts[int(slower.argmin())]


def test_a_head_is_dealt_out_like_blocks_where_stages_are_balanced() -> None:
    """The slowest of the stages is the best that any number of blocks beside the head gives."""
    for pp, head in ((8, 0.4), (8, 2.9), (8, 6.5), (16, 1.3), (32, 0.7)):
        one = work(GPT3, f"pp{pp}.mb1.bf16", 64, replace(MEGATRON, balanced=2))
        best = min(max(np.ceil((96 - beside) / (pp - 1)), beside + head) for beside in range(97))
        assert evened(one, head) == pytest.approx(best)


def test_an_rmsnorm_of_small_kernels_costs_what_runs_with_and_without_say() -> None:
    """Hagemann et al., 2023, data: LLaMA 65B on 128 A100s, tp 8, pp 2: 139.7 s without a fused RMSNorm, 107.9 with."""
    llama = Shape(
        family="llama",
        num_layers=80,
        hidden=8192,
        num_heads=64,
        ffn=22016,
        vocab=128000,
        max_seq=2048,
        activation="swiglu",
    )
    eager = replace(MEGATRON, fused=0, gradients=2)
    without, fused = (
        step_time(work(llama, "fsdp8.zero1.tp8.pp2.mb1.bf16", 2048, soft)).total
        for soft in (eager, replace(eager, fused_norm=1))
    )
    assert without - fused == pytest.approx(139.7 - 107.9, rel=0.15)


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


MIXTURE = preset_shape("mixtral-8x7b")


@pytest.mark.parametrize("stops", [0, 1])
def test_what_parts_cost_and_save(stops: int) -> None:
    """Experts computed again send nothing again, but keep what they were sent; the MLP as a whole does, and keeps less."""
    software = Software(stops=stops)
    forms = ("", "redo-attention.", "redo-experts.", "redo-mlp.", "redo-attention+mlp.", "full.")
    none, attention, experts, mlp, both, full = (
        work(MIXTURE, f"fsdp64.zero1.ep8.mb1.{form}bf16", 64, software) for form in forms
    )
    again = [float(step_time(it).recompute) for it in (none, attention, experts, mlp, both, full)]
    assert again[0] == 0
    assert again[2] < again[3] < again[4]
    assert again[1] + again[3] == pytest.approx(again[4], rel=1e-6)
    assert again[4] == pytest.approx(again[5], rel=0.02 if not stops else 0.2)
    held = [float(footprint(it).activations) for it in (none, attention, experts, mlp, both, full)]
    assert held[0] > held[2] > held[3] > held[4] > held[5]
    assert held[0] - held[1] == pytest.approx(held[3] - held[4], rel=1e-6)


def test_what_is_computed_again_ends_before_the_last_product() -> None:
    """Which is 27 % of llama3-8b's matrices in a block: 4096 · 14336 of 218 million."""
    whole, stopped = (
        step_time(work(preset_shape("llama3-8b"), "fsdp64.mb1.full.bf16", 64, Software(stops=flag))) for flag in (0, 1)
    )
    saved = float(whole.recompute - stopped.recompute) / float(whole.matmul / 3)
    assert saved == pytest.approx(4096 * 14336 / 218e6, rel=0.05)


def test_gpus_whose_names_end_as_a_number_begins_may_be_counted_with_one_letter_less() -> None:
    assert read_cluster("mi300x64") == read_cluster("mi300xx64") == read_cluster("mi300x", 64)


def test_every_cluster_is_read_and_a_wrong_one_named(tmp_path) -> None:
    for name in cluster_names():
        assert read_cluster(f"{name}x64").gpus == 64
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        read_cluster("h10")
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "h100"\nnetwork_gb_per_s = 12.5\n')
    assert read_cluster(str(mine), 16).network_gb_per_s == 12.5
    mine.write_text('base = "h100"\nnetwork = 12.5\n')
    with pytest.raises(ValueError, match="unknown setting 'network': did you mean 'network_wait_us'"):
        read_cluster(str(mine))


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "llama3-8b", "mixtral-8x7b"])
def test_a_process_alone_holds_all_parameters(name: str) -> None:
    """Latent attention and shared experts are counted too."""
    shape = preset_shape(name)
    held = footprint(numbers(shape, Layout.parse("mb1.bf16"), Job(seq=4096, global_batch=1), A100, MEGATRON))
    assert held.weights / 2 == pytest.approx(shape.num_params, rel=0.002)


def test_deepseek_is_about_as_fast_as_it_was_measured() -> None:
    """NVIDIA dgxc-benchmarking v25.05: 48.9 s a step of 4,096 sequences on 512 H100s."""
    layout = Layout.parse("fsdp32.zero1.ep64.etp1.tp2.sp.pp8.mb1.bf16")
    job, cluster = Job(seq=4096, global_batch=4096), read_cluster("h100x512")
    time = step_time(numbers(preset_shape("deepseek-v3"), layout, job, cluster, Software(flash=2))).total
    assert time == pytest.approx(48.9, rel=0.2)


def test_latent_attention_multiplies_as_much_as_the_shape_says() -> None:
    """Against the time of one product with as many multiplications, at the rate of large ones."""
    shape = preset_shape("deepseek-v3").model_copy(update={"experts": None})
    chip = A100.machine()
    matmul = Passes.of(
        numbers(shape, Layout.parse("mb4.bf16"), Job(seq=4096, global_batch=4), A100, MEGATRON)
    ).dense.matmul
    ideal = 2 * 4 * 4096 * shape.block_matmul_params(0) / (chip.peak * chip.gemm)
    assert ideal < matmul[0] < 1.25 * ideal
    assert 2 * ideal < matmul[1] < 2.6 * ideal


@pytest.mark.parametrize(
    ("name", "chunks", "about"),
    [("gpipe", 1, 0), ("1f1b", 1, 0), ("interleaved", 2, 0.01), ("interleaved", 4, 0.01), ("bfs", 2, 0),
     ("zbh1", 1, 0.2), ("zbv", 2, 0.01), ("dualpipev", 2, 0.2)],
)  # fmt: skip
def test_micro_batches_in_flight_are_those_of_the_schedule(name: str, chunks: int, about: float) -> None:
    """Counted in the real table: kept from a forward pass until the gradients of weights are made."""
    pp, count = 4, 16
    table = make_schedule(name, pp, chunks, count)
    most = 0.0
    for order in table.orders:
        held = 0
        for op in order:
            late = (op.stage, op.micro_batch) in table.put_off
            held += {"F": 1, "B": 0 if late else -1, "W": -1}[op.kind]
            most = max(most, held / chunks)
    told = min(count, flying(name, pp, chunks))
    assert told == pytest.approx(most, rel=about)


def test_memory_is_saved_where_it_is_said_to_be() -> None:
    """Each way of saving takes less memory than none and more time, and partial recomputation lies between."""

    def at(text: str) -> tuple[float, float]:
        one = numbers(
            preset_shape("llama3-8b"), Layout.parse(text), Job(seq=8192, global_batch=64), read_cluster("h100x8"), WEFT
        )
        return float(footprint(one).total), float(step_time(one).total)

    plain, quarter, half, full = (at(f"fsdp8.mb1.{word}bf16") for word in ("", "full/4.", "full/2.", "full."))
    assert plain[0] > quarter[0] > half[0] > full[0]
    assert plain[1] < quarter[1] < half[1] < full[1]
    for word in ("selective.", "offload.", "chunked."):
        saved = at(f"fsdp8.mb1.{word}bf16")
        # where a block's backward pass takes more than the logits, chunks save nothing
        assert saved[0] < plain[0] or (word == "chunked." and saved[0] == plain[0]), word
        assert saved[1] >= plain[1], word


def test_ulysses_sends_less_than_an_all_gather() -> None:
    """Jacobs et al. 2023, section 3.2: a part of queries, keys, values and results to each, not keys and values to all."""
    shape = GPT3.model_copy(update={"num_layers": 8, "max_seq": 65536})
    ulysses, gathers = (
        step_time(numbers(shape, Layout.parse(f"cp8.{kind}mb1.bf16"), Job(seq=65536, global_batch=1), A100)).cp
        for kind in ("ulysses.", "")
    )
    assert 0 < ulysses < gathers


def test_software_that_waits() -> None:
    """Its properties cost what they say: milliseconds a block under tp, and seconds a micro-batch in a pipeline."""
    soft = Software(tp_host=2.2e-3, stall=0.65)
    tiny = Shape(num_layers=8, hidden=1024, num_heads=16, ffn=4096, vocab=32000, max_seq=2048)
    assert step_time(work(tiny, "tp8.sp.mb1.bf16", 4, soft)).launch > 4 * 8 * 1e-3
    assert step_time(work(tiny, "tp8.sp.mb1.bf16", 4, Software())).launch < 4 * 8 * 1e-3
    waits, goes = (step_time(work(GPT3, "tp8.sp.pp4.mb1.bf16", 64, one)).pp for one in (soft, Software()))
    assert waits - goes == pytest.approx(64 * 2 * 0.65)
    whole, parts = (step_time(work(GPT3, "tp8.pp8.mb1.bf16", 64, Software(whole_pp=flag))).pp for flag in (1, 0))
    assert 4 < whole / parts < 8


def test_a_cpu_that_does_not_wait_launches_ahead() -> None:
    """While the pipeline fills: only one that waits for messages of stages is late for each block by itself."""
    tiny = Shape(num_layers=8, hidden=1024, num_heads=16, ffn=4096, vocab=32000, max_seq=2048)
    ahead, waits = (
        step_time(work(tiny, "tp2.pp8.mb1.bf16", 8, Software(tp_host=2.2e-3, blocking=flag))) for flag in (0, 1)
    )
    assert ahead.launch < waits.launch
    assert ahead.total < waits.total
    many = step_time(work(tiny, "tp2.pp8.mb1.bf16", 1024, Software(tp_host=2.2e-3)))
    assert many.total > 1024 * 2.2e-3, "and no step is shorter than what the CPU has to do for it"


def test_rank_0_has_the_first_stage() -> None:
    """Whose process keeps most micro-batches and no logits."""
    one = work(GPT3.model_copy(update={"vocab": 512000}), "tp8.sp.pp2.mb1.full.bf16", 64)
    first, fullest = footprint(one, first=True), footprint(one)
    assert first.logits == 0
    assert first.total < fullest.total
    assert first.allocated == pytest.approx(first.total - first.outside)


def test_what_waits_is_known_worse() -> None:
    calm, waiting = (step_time(work(GPT3, text, 512)) for text in ("tp8.sp.pp8.mb1.bf16", "fsdp512.mb1.bf16"))
    assert calm.spread == pytest.approx(0.12, abs=0.03)
    assert waiting.spread > 1.5 * calm.spread
    kept, redone = (footprint(work(GPT3, f"tp8.sp.pp8.mb1.{word}bf16", 64)) for word in ("", "full."))
    assert kept.spread > redone.spread


def test_gradients_that_are_added_up_apart_cost_their_traffic() -> None:
    """Each micro-batch's, in bf16, read, and their fp32 sum read and written; under ZeRO 3 there are only shares."""
    apart, fused = (step_time(work(GPT3, "tp8.sp.pp8.mb1.bf16", 64, Software(adds=flag))) for flag in (1, 0))
    held = GPT3.num_params / 64
    assert apart.optimizer - fused.optimizer == pytest.approx(64 * held * (2 + 2 * 4) / (0.93 * 2.039e12), rel=0.1)
    sharded = [step_time(work(GPT3, "fsdp64.mb1.full.bf16", 64, Software(adds=flag))).total for flag in (1, 0)]
    assert sharded[0] == sharded[1]


def test_gradients_that_all_processes_get_travel_once_more() -> None:
    """An all-reduce is a reduce-scatter and an all-gather; under ZeRO 3 and of plain replicas nothing changes."""
    plan = {
        (text, flag): step_time(work(GPT3, text, 512, Software(overlap_dp=0, whole_dp=flag))).dp
        for text in ("fsdp8.zero1.tp8.sp.pp8.mb1.bf16", "fsdp8.tp8.sp.pp8.mb1.bf16", "dp8.tp8.sp.pp8.mb1.bf16")
        for flag in (0, 1)
    }
    once = GPT3.num_params / 64 * 4 * 7 / 8 / (25e9 * 0.62)
    more = plan["fsdp8.zero1.tp8.sp.pp8.mb1.bf16", 1] - plan["fsdp8.zero1.tp8.sp.pp8.mb1.bf16", 0]
    assert more == pytest.approx(once, rel=0.2)
    for text in ("fsdp8.tp8.sp.pp8.mb1.bf16", "dp8.tp8.sp.pp8.mb1.bf16"):
        assert plan[text, 1] == plan[text, 0]


def test_zero_2_reduces_gradients_in_every_pass() -> None:
    """It has room for its share alone (parallel/shard.py, prepare_backward); a step of one pass is one of ZeRO 1."""
    alone = Software(overlap_dp=0)

    def messages(layout: str, batch: int, software: Software = alone) -> float:
        return step_time(work(GPT3, layout, batch, software)).dp

    zero1, zero2 = ("fsdp64.zero1.tp8.mb1.full.bf16", "fsdp64.zero2.tp8.mb1.full.bf16")
    assert (
        messages(zero2, 64)
        == messages(zero1, 64)
        == messages(zero1, 256)
        == messages(zero2, 256, Software(overlap_dp=0, once=1))
    )
    each = (messages(zero2, 256) - messages(zero1, 256)) / 3
    assert each == pytest.approx(GPT3.num_params / 8 * 4 * 63 / 64 / (25e9 * 0.647 * 64**-0.0321), rel=0.05)
    hidden = messages(zero2, 256, Software()) - messages(zero1, 256, Software())
    assert 0 < hidden < 3 * each


def test_a_group_that_uses_one_adapter_of_a_node() -> None:
    """With one of 12.5 GB/s eight of a node's processes have no more together than two that bring 6.25 each."""
    omni = A100.model_copy(update={"network_gb_per_s": 6.25})
    plain, one = (cluster.machine() for cluster in (omni, omni.model_copy(update={"adapter_gb_per_s": 12.5})))
    for stride, ratio in ((1, 4), (2, 2), (4, 1), (8, 1)):
        size = 128 // stride
        times = [collectives.rate(size, stride, machine) for machine in (plain, one)]
        assert times[0] / times[1] == pytest.approx(ratio)
        sums = [collectives.reduce(16 // stride, stride, machine, 1e10) for machine in (one, plain)]  # over a tree
        assert sums[0] / sums[1] == pytest.approx(ratio if stride < 8 else 1, rel=0.05)
    assert collectives.rate(8, 1, plain) == collectives.rate(8, 1, one)


def test_a_pipeline_there_and_back_has_blocks_inside_whatever_the_software_balances() -> None:
    held = footprint(work(GPT3, "fsdp8.pp4.vp2.zbv.mb1.bf16", 64, Software(balanced=0)))
    assert np.isfinite(held.total)


def test_copies_that_a_block_keeps_are_counted() -> None:
    """Of as many hidden states in 16 bits, cut over tp."""
    plain, copies = (block_activations(work(GPT3, "tp8.sp.mb1.bf16", 8, Software(copies=count))) for count in (0, 2))
    assert copies - plain == 2 * 2 * 2048 * GPT3.hidden / 8


def test_weights_that_are_given_in_turns_take_one_for_each_process() -> None:
    """Of those that share the states; where nothing is shared there are no turns."""
    one, none = (
        {
            text: step_time(work(GPT3, text, 512, Software(turns=flag))).dp
            for text in ("fsdp64.zero1.tp8.mb1", "dp64.tp8.mb1")
        }
        for flag in (2e-3, 0)
    )
    assert one["fsdp64.zero1.tp8.mb1"] - none["fsdp64.zero1.tp8.mb1"] == pytest.approx(64 * 2e-3)
    assert one["dp64.tp8.mb1"] == none["dp64.tp8.mb1"]


def test_selective_recomputation_can_keep_every_second_product() -> None:
    """As torchtitan's does: the other half are multiplied again, which costs time and saves memory."""
    layout, soft = "fsdp64.mb1.selective.bf16", Software(alternate=1)
    second, usual = (work(GPT3, layout, 64, one) for one in (soft, Software()))
    assert block_activations(second) < 0.75 * block_activations(usual)
    passes = Passes.of(second)
    more = step_time(second).recompute - step_time(usual).recompute
    assert more == pytest.approx(GPT3.num_layers * passes.dense.matmul[0] / 2)
    plain = (work(GPT3, "fsdp64.mb1.bf16", 64, one) for one in (soft, Software()))
    assert len({float(block_activations(one)) for one in plain}) == 1


def test_logits_take_what_the_software_keeps_of_them() -> None:
    small, large = (footprint(work(GPT3, "fsdp64.mb1.full.bf16", 64, Software(logits=size))) for size in (4, 12))
    assert large.logits - small.logits == 8 * 2048 * GPT3.vocab


def test_a_network_whose_adapters_wait_for_the_cpu() -> None:
    """Costs what it says for each node, and only what crosses nodes and is waited for."""
    slow = A100.model_copy(update={"network_wait_us": 350})
    layout, job = Layout.parse("tp16.mb1.bf16"), Job(seq=2048, global_batch=4)
    times = [step_time(numbers(GPT3, layout, job, cluster, Software())).tp for cluster in (slow, A100)]
    assert times[0] - times[1] == pytest.approx(4 * GPT3.num_layers * 8 * 2 * 350e-6)
    inside = [
        step_time(numbers(GPT3, Layout.parse("tp8.mb1.bf16"), job, cluster, Software())) for cluster in (slow, A100)
    ]
    assert inside[0].total == inside[1].total


def test_groups_over_both_cpus_of_a_node_share_what_joins_these() -> None:
    """As measured on eight A100s on PCIe (SimuMax, configs/system/a100_pcie.json): four pairs have 4 GB/s each."""
    pcie, switched = read_cluster("a100-80gb-pcie").machine(), A100.machine()
    for stride, size, gb_per_s in ((4, 2, 4), (2, 4, 8), (1, 8, 16)):
        assert collectives.rate(size, stride, pcie) == pytest.approx(gb_per_s * 1e9)
        assert collectives.rate(size, stride, switched) == collectives.rate(8, 1, switched)
    assert collectives.rate(4, 1, pcie) == collectives.rate(2, 1, pcie) > 16e9  # behind one CPU
    # each of four sends half of 1 GB to the other CPU's, which is 2 GB at 16 GB/s
    assert collectives.all_to_all(8, 1, pcie, 1e9) == pytest.approx(2 / 16, rel=1e-3)
    assert collectives.all_to_all(4, 1, pcie, 1e9) == pytest.approx(
        0.75 / 25 * 25e9 / collectives.rate(4, 1, pcie), rel=1e-2
    )


def test_experts_that_no_other_process_has_are_not_reduced() -> None:
    shape = preset_shape("mixtral-8x7b")
    alone = shape.model_copy(update={"experts": None, "ffn": 64})  # next to nothing but what every process has

    def dp(layout: str, shape: Shape = shape) -> float:
        return float(step_time(work(shape, f"{layout}.mb1.bf16", 32, replace(MEGATRON, overlap_dp=0))).dp)

    def bytes_of(parameters: float, ways: int) -> float:
        return (4 + 2) * parameters * (ways - 1) / ways  # gradients in fp32, and weights in bf16 (ZeRO 1)

    experts = 3 * shape.hidden * shape.experts.ffn * 8 * shape.num_layers
    rate = float(collectives.rate(8, 1, A100.machine()))
    assert dp("fsdp8.zero1.ep8") == pytest.approx(dp("fsdp8.zero1", alone), rel=0.02)
    assert dp("fsdp8.zero1.ep4") - dp("fsdp8.zero1.ep8") == pytest.approx(bytes_of(experts / 4, 2) / rate, rel=0.02)
    assert dp("fsdp8.zero1") - dp("fsdp8.zero1.ep8") == pytest.approx(bytes_of(experts, 8) / rate, rel=0.02)
    assert dp("fsdp8.ep8") == pytest.approx(dp("fsdp8", alone), rel=0.02)
    assert dp("fsdp8") > dp("fsdp8.ep2") > dp("fsdp8.ep4") > 1.5 * dp("fsdp8.ep8")


def test_a_head_uses_a_part_of_the_block_that_its_stage_has_less() -> None:
    def head(layers: int) -> tuple[float, float]:
        plain = work(GPT3.model_copy(update={"num_layers": layers}), "pp8.mb1.bf16", 64)
        passes = Passes.of(plain)
        return float(step_time(plain).head), 64 * float(passes.head)

    taken, whole = head(96)
    assert taken == pytest.approx(whole)
    block = step_time(work(GPT3, "mb1.bf16", 64))
    one = float(block.matmul + block.attention + block.elementwise) / GPT3.num_layers
    for layers in (94, 102):  # with the embedding and the head as a block each they are dealt out evenly
        taken, whole = head(layers)
        assert taken == pytest.approx(max(0, whole - 0.3 * one), rel=0.05)


def test_megatron_hides_stages_messages_where_they_interleave() -> None:
    hides, waits = replace(MEGATRON, overlap_pp=1), replace(MEGATRON, overlap_pp=0)
    straight, interleaved = "pp8.mb1.bf16", "pp8.vp3.interleaved.mb1.bf16"
    assert step_time(work(GPT3, straight, 64, hides)).pp == step_time(work(GPT3, straight, 64, waits)).pp
    assert step_time(work(GPT3, interleaved, 64, hides)).pp < 0.6 * step_time(work(GPT3, interleaved, 64, waits)).pp


def test_zero_3_can_have_less_of_the_network() -> None:
    def dp(layout: str, sharded: float) -> float:
        return float(step_time(work(GPT3, f"{layout}.mb1.bf16", 512, Software(overlap_dp=0, sharded=sharded))).dp)

    slower = dp("fsdp512", 0.5) - dp("fsdp512", 1)
    assert dp("fsdp512", 0.25) - dp("fsdp512", 0.5) == pytest.approx(2 * slower)
    assert dp("fsdp512", 1) > slower > 0.7 * dp("fsdp512", 1)  # but for what messages take from the computation
    assert dp("fsdp512.zero1", 0.25) == dp("fsdp512.zero1", 1)  # which reduces and gathers otherwise


def test_an_rmsnorm_of_small_kernels_keeps_what_it_takes_and_gives_in_fp32() -> None:
    shape = preset_shape("llama3-8b")
    eager, fused = (
        block_activations(work(shape, "mb1.bf16", 1, Software(fused=0, fused_norm=norm))) for norm in (0, 1)
    )
    assert eager - fused == 2 * (4 + 4 - 2) * 2048 * shape.hidden  # of two norms: fp32 twice, for its input in bf16


@pytest.mark.parametrize(
    ("card", "best"), [("b200x8", 1745), ("b300x8", 0.79 * 2250), ("gb200x8", 1822)], ids=["B200", "B300", "GB200"]
)
def test_cards_of_one_architecture_keep_as_much_of_their_best_products(card: str, best: float) -> None:
    """In 16 bits, TFLOP/s: the best that stas00/ml-engineering found. A B200's had been one machine's, which keeps 0.64."""
    cluster = read_cluster(card)
    assert cluster.gemm_efficiency * cluster.peak_tflops / best == pytest.approx(0.73, abs=0.02)


def test_a_gh200_of_alps_has_what_its_power_leaves_of_an_h100() -> None:
    """660 W a module, 50 or more of them its CPU's (CSCS), against 700; how rates go with power is Blackwell's."""
    alps, h100, gb200, gb300 = (read_cluster(name, 8) for name in ("gh200", "h100", "gb200", "gb300"))
    power = math.log(gb300.gemm_efficiency / gb200.gemm_efficiency) / math.log(1400 / 1200)
    assert alps.gemm_efficiency == pytest.approx((610 / 700) ** power * h100.gemm_efficiency, rel=0.01)
