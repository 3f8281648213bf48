"""`weft train --profile` and `weft profile attach` on real runs of two processes."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from forked import cut, end, settings, start, until
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.tree import Config
from weft.plan.memory.moments import layout_memory
from weft.profile.load import Profile, load
from weft.profile.memory import memory_of
from weft.profile.merge import clock_words
from weft.profile.request import Request
from weft.profile.summary import by_part
from weft.train.run import Run

pytestmark = pytest.mark.slow
PATIENCE = 300
"""Seconds: a run takes two or three on a quiet machine."""
STEPS = {"steps": 8, "global_batch": 8, "seq": 16, "device": "cpu"}


def profiled(run: Path, layout: str, request: Request) -> Profile:
    config = settings(run, layout, train=STEPS, checkpoint={"every": 0})
    request.write(run)
    end(start(config), PATIENCE)
    return load(run)


def axes(profile: Profile) -> set[str]:
    return {kind for rank in profile.ranks for kind, seconds in rank.kinds.items() if seconds > 0 and "exposed" in kind}


@pytest.mark.parametrize(
    ("layout", "messages"),
    [
        ("tp2", {("tp", "all_reduce")}),
        ("fsdp2.mb2", {("fsdp", "all_gather"), ("fsdp", "reduce_scatter")}),
        ("dp2", {("dp", "all_reduce")}),
        ("cp2.ring", {("cp", "all_reduce")}),
        ("pp2.mb2", set()),
    ],
)
def test_a_run_is_profiled_on_every_rank(tmp_path: Path, layout: str, messages: set[tuple[str, str]]) -> None:
    found = profiled(tmp_path / "run", layout, Request(4, 2, (0, 1)))
    assert (found.steps, [rank.number for rank in found.ranks]) == ([4, 5], [0, 1])
    assert found.config is not None
    for rank in found.ranks:
        assert sum(rank.kinds.values()) == pytest.approx(rank.seconds, rel=1e-9)
        assert rank.kinds["gemm"] > 0
        assert {(it.axis, it.kind) for it in rank.traffic if it.axis != "all"} >= messages
    names = [layer.name for layer in by_part(found)]
    assert names[:4] == ["embedding", "blocks.0", "blocks.1", "head and loss"]
    for layer in by_part(found)[:4]:
        assert layer.forward > 0, layer.name
        assert layer.backward > 0, layer.name
    assert ("bubble" in found.kinds) == layout.startswith("pp")
    assert clock_words(found).startswith("clocks agree within")


@pytest.mark.parametrize("layout", ["tp2", "fsdp2.mb2"])
def test_memory_at_the_peak_is_what_the_planner_says(tmp_path: Path, layout: str) -> None:
    """Tensor by tensor: of the whole peak, what is held for backward, and the logits."""
    found = profiled(tmp_path / "run", layout, Request(4, 2, (0,)))
    config = found.config
    assert config is not None
    [rank] = found.ranks
    memory = memory_of(rank.breakdown.attribution, rank.facts)
    assert memory is not None
    assert sum(memory.holders.values()) == memory.peak
    planned = layout_memory(config)[0].peak
    assert memory.peak == pytest.approx(planned.tensors, rel=0.05)
    assert memory.holders["optimizer"] == planned.optimizer
    assert memory.holders["weights"] == planned.weights


def test_recomputation_is_told_apart(tmp_path: Path) -> None:
    found = profiled(tmp_path / "run", "single.full", Request(3, 1, (0,)))
    blocks = [layer for layer in by_part(found) if layer.is_block]
    assert all(layer.again > 0 for layer in blocks)


def test_a_profiled_run_learns_what_an_unprofiled_one_does(tmp_path: Path) -> None:
    plain = settings(tmp_path / "plain", "fsdp2", train=STEPS, checkpoint={"every": 0})
    end(start(plain), PATIENCE)
    looked_at = cut(plain, "fsdp2", tmp_path / "looked")
    Request(3, 2, (0, 1)).write(tmp_path / "looked")
    end(start(looked_at), PATIENCE)
    losses = [
        [json.loads(line)["loss"] for line in (Path(it.run) / "log.jsonl").read_text().splitlines()]
        for it in (plain, looked_at)
    ]
    assert losses[0] == losses[1]


def test_a_run_under_way_is_attached_to(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "tp2", train={**STEPS, "steps": 100_000}, checkpoint={"every": 0})
    run = Run(Path(config.run))
    with run.held():
        pids = start(config)
        until(lambda: (run.path / "log.jsonl").exists())
        done: list = []
        asking = threading.Thread(
            target=lambda: done.append(CliRunner().invoke(app, ["profile", "attach", str(run.path), "--steps", "2"]))
        )
        asking.start()
        asking.join(PATIENCE)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        end(pids, PATIENCE)
    (found,) = done
    assert found.exit_code == 0, found.output
    assert "where a step's time goes" in found.output
    assert "2 ranks" in found.output


def test_attaching_to_nobody_is_refused(tmp_path: Path) -> None:
    config: Config = settings(tmp_path / "run")
    Run(tmp_path / "run").claim(config, False)
    for words, said in (
        (["attach", str(tmp_path / "run")], "nobody is training in"),
        (["attach", str(tmp_path / "no")], "is no run: there is no config.toml"),
        ([str(tmp_path / "no"), "--steps", "2"], "is no run: there is no config.toml"),  # the verb may be left out
    ):
        done = CliRunner().invoke(app, ["profile", *words])
        assert isinstance(done.exception, ValueError)
        assert said in str(done.exception)
