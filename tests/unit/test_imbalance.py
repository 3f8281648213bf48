"""Experts that are given more than others: what it does to the process that all wait for, and to what is planned."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_calibrate import round_machine, settings, write_run
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.advice import Question
from weft.plan.machine import read_cluster
from weft.plan.memory.footprint import footprint
from weft.plan.numbers import MEGATRON, WEFT, Job, numbers
from weft.plan.plan import Plan
from weft.plan.search import search
from weft.plan.time.block import expert_time
from weft.plan.time.counted import counted_time
from weft.plan.time.imbalance import fullest, fullest_share
from weft.plan.time.refit import read_runs
from weft.plan.work import Work
from weft.presets import preset_shape

H100 = read_cluster("h100", 64)


def job(busiest: float, batch: int = 512) -> Job:
    return Job(seq=4096, global_batch=batch, busiest_expert=busiest)


def work(shape: Shape, layout: str, busiest: float) -> Work:
    return numbers(shape, Layout.parse(layout), job(busiest), H100, MEGATRON)


@pytest.mark.parametrize(
    ("experts", "ep", "blocks"), [(8, 8, 32), (64, 8, 16), (128, 16, 48), (256, 64, 58), (8, 2, 32)]
)
def test_the_fullest_process_is_that_of_loads_drawn_at_random(experts: int, ep: int, blocks: int) -> None:
    loads = 1 + 0.25 * np.random.default_rng(0).normal(size=(200, blocks, experts))
    loads /= loads.mean(axis=2, keepdims=True)
    busiest = loads.max(axis=(1, 2)).mean()
    drawn = loads.reshape(200, blocks, ep, -1).mean(axis=3).max(axis=2).mean()
    assert drawn - 1 > 0.05
    assert fullest_share(busiest, experts, blocks, ep) - 1 == pytest.approx(drawn - 1, rel=0.06)


def test_one_process_has_all_there_is_and_one_expert_each_is_that_expert() -> None:
    assert fullest_share(3.0, 8, 1, 1) == 1
    assert fullest_share(3.0, 8, 1, 8) == pytest.approx(3)
    assert fullest_share(1.0, 64, 16, 8) == 1


def test_products_and_messages_of_experts_take_the_share_of_the_fullest() -> None:
    one = preset_shape("mixtral-8x7b").model_copy(update={"num_layers": 1})
    even, twice = (work(one, "fsdp64.zero1.ep8.mb8.bf16", busiest) for busiest in (1, 2))
    assert fullest(twice) == pytest.approx(2)
    (products, messages, moved), (more, slower, further) = expert_time(even), expert_time(twice)
    for before, after in zip(products, more, strict=True):
        assert after[0] == pytest.approx(2 * before[0], rel=0.02)  # large enough to be bound by their FLOPs
    assert slower[0] == pytest.approx(2 * messages[0], rel=0.03)  # but for what starting them takes
    assert further == pytest.approx(
        1.5 * moved
    )  # what a process deals out is as much as ever; what it is dealt is twice that


def test_memory_is_that_of_the_fullest() -> None:
    shape = preset_shape("mixtral-8x7b")
    even, twice = (work(shape, "fsdp64.zero1.ep8.mb1.bf16", busiest) for busiest in (1, 2))
    rows = 4096 * 2 * (float(fullest(twice)) - 1)  # more of them, each the hidden state twice and three inner states
    blocks = shape.num_layers * 2 * rows * (2 * shape.hidden + 3 * shape.experts.ffn)  # type: ignore[union-attr]
    assert footprint(twice).activations - footprint(even).activations == pytest.approx(blocks)
    assert footprint(twice).working > footprint(even).working
    assert footprint(twice).weights == footprint(even).weights


def test_the_busier_an_expert_the_fewer_processes_share_the_experts() -> None:
    shape = preset_shape("mixtral-8x7b")
    best = [search(shape, job(busiest), H100).best(1)[0] for busiest in (1, 4)]
    assert best[0].layout.ep > 1 == best[1].layout.ep
    assert best[0].seconds < best[1].seconds < Plan.of(shape, best[0].layout, job(4), H100).seconds


def test_twice_as_busy_is_the_same_layout_that_waits_longer_and_never_more_than_can_be() -> None:
    shape, layout = preset_shape("mixtral-8x7b"), Layout.parse("fsdp64.zero1.ep8.mb1.full.bf16")
    plan = Plan.of(shape, layout, job(1.5), H100)
    uneven = Question(shape, job(1.5), H100, WEFT).busier_expert(plan)
    assert uneven is not None
    assert (uneven.layout, uneven.job.busiest_expert) == (layout, 3)
    assert uneven.seconds > plan.seconds
    assert Question(shape, job(3), H100, WEFT).busier_expert(plan) is None  # a token takes 2 of 8: 4 times at most


def test_what_if_says_it() -> None:
    shape, node = preset_shape("deepseek-v2-lite"), read_cluster("h100", 8)
    for micro_batch, changes in ((4, True), (1, False)):  # with 1 all wait for the CPU's launches
        layout = Layout.parse(f"fsdp8.zero1.ep8.mb{micro_batch}.full.bf16")
        plan = Plan.of(shape, layout, job(1, 64), node)
        answers = Question(shape, job(1, 64), node, WEFT).answers(plan, None, what_if=True)
        [said] = [one.answer for one in answers if one.question == "busiest expert given 2 times its share"]
        assert said.startswith("+")
        assert said.startswith("+0.0 % time, ") != changes
        assert said.endswith("GiB a GPU")


@pytest.mark.parametrize(
    ("model", "said"), [("llama3-8b", "this model has no experts"), ("mixtral-8x7b", "with 2 of 8 for each token")]
)
def test_more_than_can_be_is_refused(model: str, said: str) -> None:
    done = CliRunner().invoke(
        app, ["plan", "layouts", model, "--cluster", "h100x64", "--batch", "64", "--busiest-expert", "5"]
    )
    assert isinstance(done.exception, ValueError)
    assert said in str(done.exception)


def words(command: list[str]) -> str:
    """What it prints, however that is cut into lines."""
    return " ".join(CliRunner().invoke(app, command).output.split())


def test_a_search_says_how_experts_are_used() -> None:
    ask = ["plan", "layouts", "mixtral-8x7b", "--cluster", "h100x64", "--batch", "512"]
    assert "experts are used evenly" in words(ask)
    assert "the busiest expert is given 1.5 times its share" in words([*ask, "--busiest-expert", "1.5"])


def test_a_counted_step_waits_for_the_fullest_too() -> None:
    config = settings("fsdp2.ep2", family="mixtral", experts={"num_experts": 8, "per_token": 2})
    even, uneven = (
        counted_time(config.model, config.layout, Job(seq=64, global_batch=8, busiest_expert=busiest), round_machine())
        for busiest in (1, 2)
    )
    longer = {field.name for field in fields(even) if getattr(uneven, field.name) > getattr(even, field.name)}
    assert longer == {"matmul", "elementwise", "ep"}


def test_a_run_tells_how_busy_its_busiest_expert_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "dp2", 1.0)
    assert read_runs([run])[0].busiest_expert == 1
    lines = [json.loads(line) | {"busiest_expert": 1.75} for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_runs([run])[0].busiest_expert == 1.75
