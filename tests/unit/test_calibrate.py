"""Curves and what is counted by them; calibration of this very process; refitting; the cluster file."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.launch.process import start_process, stop_process
from weft.plan.machine import Cluster, read_cluster
from weft.plan.memory.moments import BASE, settled
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import search
from weft.plan.show.text import write_cluster
from weft.plan.time.counted import counted_time
from weft.plan.time.curves import Curves, Grid
from weft.plan.time.refit import predicted, read_runs, refit
from weft.presets import preset_shape
from weft.tune import calibrate, measure
from weft.tune.clock import Clock, quiet

LLAMA = {
    "family": "llama", "num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 128, "vocab": 256,
    "max_seq": 64,
}  # fmt: skip
WAYS = ("forward", "input", "weights")
BOTH = ("forward", "backward")
RATE, MEMORY, WIRE = 1e9, 1e9, 1e8
"""A machine of round numbers: FLOP/s, numbers/s of element-wise work, bytes/s of messages."""


def flat(axes: tuple[tuple[float, ...], ...], seconds: Any) -> Grid:
    from itertools import product

    return Grid(axes=axes, seconds=tuple(seconds(*place) for place in product(*axes)))


def round_machine(processes: int = 2, **over: Any) -> Curves:
    """Curves of a machine whose every operation takes what it should, with nothing lost to small sizes."""
    sizes, grids = (16.0, 4096.0), {}
    for precision in ("fp32", "bf16"):
        for way in WAYS:
            grids[f"product_{way}_{precision}"] = flat((sizes,) * 3, lambda m, n, k: 2 * m * n * k / RATE)
        for way, times in zip(BOTH, (1, 2), strict=True):
            for name in ("rmsnorm", "layernorm", "swiglu", "gelu", "rope"):
                grids[f"{name}_{way}_{precision}"] = flat((sizes,), lambda n, times=times: times * n / MEMORY)
            grids[f"attention_{way}_{precision}"] = flat(
                (sizes, sizes), lambda t, e, times=times: times * 2 * t * t * e / RATE
            )
        for name in ("add", "copy", "rows", "fill", "accumulate", "scale", "squares", "lower", "adamw", "sort"):
            grids[f"{name}_{precision}"] = flat((sizes,), lambda n: n / MEMORY)
        grids[f"loss_{precision}"] = flat((sizes,), lambda v: v / MEMORY)
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"):
            grids[f"{name}_{precision}"] = flat(((2.0, 4.0), sizes), lambda _, size: size / WIRE)
    values = {"processes": processes, "threads": 1, "device": "cpu", "beside": 0.5, "unit": 1e-4, "grids": grids}
    return Curves(**{**values, **over})


def cluster(curves: Curves | None = None, **over: Any) -> Cluster:
    values = read_cluster("laptop-cpu", 2).model_dump() | {"curves": curves} | over
    return Cluster.model_validate(values)


def settings(layout: str, **over: Any) -> Config:
    return make_config({"model": {**LLAMA, **over}, "layout": layout, "train": {"global_batch": 8, "seq": 64}})


def times(layout: str, curves: Curves | None = None, **over: Any) -> dict[str, float]:
    config = settings(layout, **over)
    found = counted_time(config.model, config.layout, Job(seq=64, global_batch=8), curves or round_machine())
    return {field.name: getattr(found, field.name) for field in fields(found)} | {"total": found.total}


# -- curves -----------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_points_and_is_a_power_between_and_beyond() -> None:
    grid = Grid(axes=((1, 10), (2, 8)), seconds=(1, 4, 100, 400))
    assert [grid.at(m, n) for m in (1, 10) for n in (2, 8)] == pytest.approx([1, 4, 100, 400])
    assert grid.at(math.sqrt(10), 2) == pytest.approx(10)
    assert grid.at(1, 4) == pytest.approx(2)
    assert grid.at(100, 16) == pytest.approx(10**4 * 8)
    assert grid.at(0.1, 2) == pytest.approx(0.01)
    assert grid.at(0, 2) == 0
    assert Grid(axes=((2,), (1, 2)), seconds=(3, 6)).at(64, 2) == pytest.approx(6)


def test_beyond_its_end_a_curve_that_waited_for_its_start_grows_with_its_size() -> None:
    start, rate = 5e-5, 1e-9
    grid = Grid(axes=((1e3, 1e5), (1, 2)), seconds=tuple(n * k * rate + start for n in (1e3, 1e5) for k in (1, 2)))
    assert grid.at(1e8, 1) == pytest.approx(1e8 * rate + start)
    assert grid.at(1e8, 2) == pytest.approx(2e8 * rate + start)
    assert grid.at(1e8, 4) == pytest.approx(4e8 * rate + start)
    noise = Grid(axes=((1e3, 1e5),), seconds=(2e-5, 1e-5))
    assert noise.at(1e8) == 1e-5


@pytest.mark.parametrize(
    ("axes", "seconds", "said"),
    [
        (((2, 1),), (1, 1), "ascending"),
        (((0, 1),), (1, 1), "above 0"),
        (((1, 2),), (1,), "2 combinations has 1 times"),
        (((1, 2),), (1, 0), "every time"),
    ],
)
def test_a_curve_that_is_none_is_refused(axes: Any, seconds: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Grid(axes=axes, seconds=seconds)


def test_a_missing_curve_is_named() -> None:
    with pytest.raises(ValueError, match=r"no curve loss_fp32: measure it again"):
        times("dp2", round_machine(grids={k: v for k, v in round_machine().grids.items() if k != "loss_fp32"}))


# -- a step, counted --------------------------------------------------------------------------------------------------


def test_matrices_take_their_flops_whatever_the_layout() -> None:
    shape = settings("dp2").model
    matrices = sum(shape.block_matmul_params(block) for block in range(shape.num_layers))
    whole = 6 * matrices * 8 * 64 / RATE
    for layout in ("dp2", "dp2.mb1", "fsdp2", "tp2", "tp2.sp", "cp2"):
        assert times(layout)["matmul"] == pytest.approx(whole / 2, rel=1e-9), layout


def test_attention_cut_over_cp_is_half_of_the_whole() -> None:
    whole = times("dp2")["attention"]
    for kind in ("cp2", "cp2.ring", "cp2.ulysses"):
        assert times(kind)["attention"] == pytest.approx(whole, rel=1e-9), kind


def test_replicas_send_their_gradients_once() -> None:
    held = 4 * settings("dp2").model.num_params
    one, two = times("dp2", round_machine(beside=0.0)), times("dp2.mb1", round_machine(beside=0.0))
    assert one["dp"] - held / 4 / MEMORY * 2 == pytest.approx(held / WIRE)  # beside filling and adding up
    assert two["dp"] - one["dp"] == pytest.approx(3 * held / 4 / MEMORY)  # three passes more that add up


def test_zero3_gathers_in_every_pass_and_zero1_once() -> None:
    two, one = times("fsdp2.mb1")["dp"], times("fsdp2.zero1.mb1")["dp"]
    assert two > 3 * one


def test_tensor_parallelism_pays_for_messages_and_not_for_updates_twice() -> None:
    tp = times("tp2")
    sent = 4 * 4 * 8 * 64 * 64 * 4 / WIRE  # two a block each way, fp32
    assert tp["tp"] == pytest.approx(sent + sent / 4 / MEMORY * WIRE, rel=0.01)
    assert tp["optimizer"] == pytest.approx(times("dp2")["optimizer"] / 2, rel=0.05)


def test_a_gpu_updates_all_weights_at_once() -> None:
    """Of grids that count calls alone: three kinds of call for each of the 3 × 9 + 3 weights, or once each."""
    curves = round_machine()
    calls = {f"{name}_fp32": flat(((16.0, 4096.0),), lambda n: 1.0) for name in ("squares", "scale", "adamw")}
    machines = [curves.model_copy(update={"device": it, "grids": curves.grids | calls}) for it in ("cpu", "cuda")]
    on_cpu, on_gpu = (times("single", machine)["optimizer"] for machine in machines)
    assert on_gpu == pytest.approx(3)
    assert on_cpu > 3 * 9 * LLAMA["num_layers"]


def test_a_pipeline_waits_as_its_table_does() -> None:
    few, many, looped = (times(name) for name in ("pp2.mb4", "pp2.mb1", "pp2.vp2.interleaved.mb1"))
    assert few["bubble"] > many["bubble"] > 0
    assert looped["bubble"] < many["bubble"]
    assert times("pp2.zbh1.mb1")["bubble"] < many["bubble"]
    assert times("dp2")["bubble"] == 0


def test_recompute_takes_what_is_not_kept() -> None:
    none, selective, full = (times(f"dp2{kind}")["recompute"] for kind in ("", ".selective", ".full"))
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    needed = 1 - 64 * 128 / matrices  # nothing of the backward pass needs what the last one gives
    forward = times("dp2")["matmul"] / 3 * needed + times("dp2")["attention"] / 3
    assert none == 0
    assert 0 < selective < full
    assert full == pytest.approx(forward + selective, rel=1e-6)
    assert times("dp2.full/2")["recompute"] == pytest.approx(full / 2)
    assert 0 < times("dp2.redo-mlp")["recompute"] < full


def test_experts_travel_only_where_they_are_dealt_out() -> None:
    experts = {"family": "mixtral", "experts": {"num_experts": 4, "per_token": 2}}
    assert times("dp2", **experts)["ep"] == 0
    assert times("fsdp2.ep2", **experts)["ep"] > 0
    assert times("dp2", **experts)["matmul"] > times("dp2")["matmul"]


def test_scales_stretch_what_they_are_of() -> None:
    plain = times("tp2")
    slower = times("tp2", round_machine(compute_scale=2.0))
    assert slower["matmul"] == pytest.approx(2 * plain["matmul"])
    farther = times("tp2", round_machine(message_scale=2.0))
    assert farther["matmul"] == pytest.approx(plain["matmul"])
    assert farther["tp"] > 1.8 * plain["tp"]


def test_fp8_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="know fp32 and bf16 alone; leave fp8 out"):
        times("dp2.fp8")


def test_latent_attention_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="know nothing of latent attention"):
        counted_time(preset_shape("deepseek-v2-lite"), Layout(), Job(seq=64, global_batch=8), round_machine())


def test_a_plan_on_a_measured_cluster_is_counted_and_on_another_is_not() -> None:
    config, job = settings("dp2"), Job(seq=64, global_batch=8)
    measured = Plan.of(config.model, config.layout, job, cluster(round_machine()))
    assert measured.seconds == pytest.approx(times("dp2")["total"])
    assert Plan.of(config.model, config.layout, job, cluster()).seconds != pytest.approx(measured.seconds)
    best = [plan.seconds for plan in search(config.model, job, cluster(round_machine())).best(5)]
    assert len(best) == 5
    assert best == sorted(best)


# -- calibration ------------------------------------------------------------------------------------------------------


def test_quiet_is_no_outlier() -> None:
    assert quiet([9.0, 1.0, 1.1, 5.0, 1.2, 1.3]) == 1.1


def test_all_that_is_counted_with_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process alone, at few and small sizes; then every layout of one process is predicted from the file."""
    small = measure.Sizes(
        rows=(16, 64), columns=(16, 32, 64), numbers=(2**12, 2**13), lengths=(16, 32), head_dims=(16, 32),
        vocabs=(64, 256), bytes=(2**12, 2**13), flops=2**20,
    )  # fmt: skip
    monkeypatch.setitem(calibrate.QUICK, "cpu", small)
    torch.set_num_threads(1)
    file = tmp_path / "here.toml"
    assert calibrate.main(["cpu", "quick", str(file)]) == 0
    found = read_cluster(str(file))
    assert found.curves is not None
    assert found.gpus == found.curves.processes == 1
    products = [grid for name, grid in found.curves.grids.items() if name.startswith("product_")]
    assert len(products) == 6
    rates = [2 * m * n * k / grid.at(m, n, k) for grid in products for m, n, k in itertools.product(*grid.axes)]
    assert found.peak_tflops * 1e12 == pytest.approx(max(rates), rel=1e-3)  # no part of a step has an MFU above 1
    job = Job(seq=64, global_batch=8)
    for layout in ("single", "mb2.full", "bf16.mb1", "chunked"):
        config = settings(layout)
        assert 0 < Plan.of(config.model, config.layout, job, found).seconds < 60
    write_cluster(found, tmp_path / "again.toml")
    assert read_cluster(str(tmp_path / "again.toml")) == found


def test_products_too_large_are_told_from_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    process = start_process("cpu")
    try:
        sizes = measure.QUICK["cpu"]
        work = [p for p in measure.points(sizes, process.device) if p.names == ("product_forward_fp32",)]
        calls: list[tuple[int, ...]] = []

        def instead(point: measure.Point) -> measure.Point:
            def took(clock: Clock) -> measure.Found:
                calls.append(point.place)
                return {point.names[0]: [point.flops / 1e9]}

            return measure.Point(point.names, point.axes, point.place, took, point.flops)

        clock = Clock(process.device, longest=0.1)
        found = calibrate.measure([instead(point) for point in work], clock, 1, shown=False)["product_forward_fp32"]
    finally:
        stop_process()
    assert len(found) == len(work) == 8
    assert max(calls) < (1024, 1024, 1024)
    assert {place: seconds[0] for place, seconds in found.items()} == {
        point.place: pytest.approx(point.flops / 1e9) for point in work
    }


# -- refit ------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, layout: str, seconds: float, steps: int = 6) -> Path:
    """A finished run's settings and log."""
    folder.mkdir()
    (folder / "config.toml").write_text(config_toml(settings(layout)))
    lines = [
        {"step": step + 1, "seconds": seconds + 0.5, "data_wait": 0.3, "checkpoint_wait": 0.2} for step in range(steps)
    ]
    lines[0]["seconds"] = 100.0
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_refit_finds_the_scales_that_made_the_runs(tmp_path: Path) -> None:
    true = round_machine(compute_scale=1.3, message_scale=0.8)
    runs = [write_run(tmp_path / name, name, times(name, true)["total"]) for name in ("dp2", "tp2", "fsdp2.mb1")]
    fit = refit(cluster(round_machine()), read_runs(runs))
    curves = fit.cluster.curves
    assert curves is not None
    assert (curves.compute_scale, curves.message_scale) == pytest.approx((1.3, 0.8), rel=0.05)
    assert all(abs(after / ran.seconds - 1) < 0.02 < abs(before / ran.seconds - 1) for ran, before, after in fit.runs)


def test_a_run_within_a_budget_is_timed_with_the_blocks_that_it_computed_again(tmp_path: Path) -> None:
    budget = BASE["cpu"] // 2**20 + 6  # with no block again its tensors are 7 MiB
    [run] = read_runs([write_run(tmp_path / "run", f"dp2.fit{budget}m", 1.0)])
    again = settled(run.config, "cpu").recompute
    assert again == "full:2"
    assert predicted(run, round_machine()) == times(f"dp2.{again}")["total"] > times("dp2")["total"]


def test_beside_a_scale_at_its_bound_the_other_is_the_best_there_is(tmp_path: Path) -> None:
    """Messages ten times as slow as measured are believed three times, and computation is scaled as goes best with that."""
    true = round_machine(message_scale=10.0)
    runs = read_runs(
        [write_run(tmp_path / name, name, times(name, true)["total"]) for name in ("dp2", "tp2", "fsdp2.mb1")]
    )
    fit = refit(cluster(round_machine()), runs)
    curves = fit.cluster.curves
    assert curves is not None
    assert curves.message_scale == 3
    assert "message_scale is at its bound" in "\n".join(fit.lines())

    def error(compute: float) -> float:
        scaled = round_machine(compute_scale=compute, message_scale=3.0)
        return sum((predicted(run, scaled) / run.seconds - 1) ** 2 for run in runs)

    assert error(curves.compute_scale) <= min(error(0.97 * curves.compute_scale), error(1.03 * curves.compute_scale))


def test_one_run_moves_both_scales_together(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "dp2", 2 * times("dp2")["total"])
    curves = refit(cluster(round_machine()), read_runs([run])).cluster.curves
    assert curves is not None
    assert curves.compute_scale == curves.message_scale == pytest.approx(2, rel=0.05)


def test_runs_that_were_faster_than_measured_show_a_higher_peak(tmp_path: Path) -> None:
    """Else they would have done more than all that the machine can; and the peak of a datasheet stays."""
    config, job = settings("dp2"), Job(seq=64, global_batch=8)
    run = write_run(tmp_path / "run", "dp2", times("dp2", round_machine(compute_scale=0.4))["total"])
    measured = cluster(round_machine(), peak_tflops=RATE / 1e12)
    fitted = refit(measured, read_runs([run])).cluster
    assert fitted.curves is not None
    assert fitted.curves.compute_scale < 0.6
    before, after = (Plan.of(config.model, config.layout, job, it).mfu(causal=True) for it in (measured, fitted))
    assert 0.5 < before < 1
    assert after < 1
    slower = cluster(round_machine(compute_scale=2.0), peak_tflops=RATE / 1e12)
    assert Plan.of(config.model, config.layout, job, slower).mfu(causal=True) == pytest.approx(before / 2, rel=0.05)
    card = cluster(fitted.curves, peak_tflops=1.0)
    assert card.peak(in_8_bits=False) == 1e12


def test_refit_by_the_command_says_before_and_after(tmp_path: Path) -> None:
    file, run = tmp_path / "here.toml", write_run(tmp_path / "run", "dp2", 1.5 * times("dp2")["total"])
    write_cluster(cluster(round_machine()), file)
    done = CliRunner().invoke(app, ["plan", "calibrate", "--out", str(file), "--from-run", str(run)])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "(-33." in text
    assert "compute_scale 1.5" in text
    curves = read_cluster(str(file)).curves
    assert curves is not None
    assert curves.compute_scale == pytest.approx(1.5, rel=0.05)


def test_runs_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", "dp2", 1.0, steps=4)
    with pytest.raises(ValueError, match="has 2 steps after the first 2"):
        read_runs([short])
    (short / "log.jsonl").unlink()
    with pytest.raises(ValueError, match=r"is .*short the folder of a run"):
        read_runs([short])
    with pytest.raises(ValueError, match="no curves to fit"):
        refit(cluster(), [])
    many = write_run(tmp_path / "many", "dp4", 1.0)
    with pytest.raises(ValueError, match="ran on 4 processes, and the curves are of 2"):
        refit(cluster(round_machine()), read_runs([many]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "here.json"], "ends with .toml"),
        (["--out", "nowhere/here.toml"], "there is no folder nowhere"),
        (["--device", "tpu"], "--device tpu is not known"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_minutes_of_measuring(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", "calibrate", *arguments])
    assert said in str(done.exception)


def test_more_processes_than_gpus_are_refused_before_any_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    done = CliRunner().invoke(app, ["plan", "calibrate", "--device", "cuda", "--processes", "2"])
    assert "--device cuda takes a GPU for each process, and PyTorch" in str(done.exception)
    assert "sees 1 here" in str(done.exception)
