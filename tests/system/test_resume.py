"""Runs that are killed, stopped, resumed: what they are in the end must not show it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import cut, end, failures, kill, settings, start, train, until
from torch import Tensor

from weft.checkpoint import save
from weft.checkpoint.folder import checkpoints, step_path
from weft.checkpoint.load import read_state
from weft.checkpoint.region import Region
from weft.checkpoint.tensors import TensorFile
from weft.checkpoint.weights import WeightsFolder
from weft.config.tree import Config
from weft.models.parameters import parameter_sizes
from weft.train import trainer
from weft.train.log import ROUTING, read_log
from weft.train.run import Run
from weft.verify.checkpoint import verify_checkpoint
from weft.verify.continuation import compare
from weft.verify.layout import Difference


def differences(unbroken: Config, resumed: Config) -> list[Difference]:
    found = list(compare(unbroken, resumed, unbroken.train.steps // 2))
    if unbroken.layout == resumed.layout:
        assert len(found) == unbroken.train.steps + 4 + 3 * len(parameter_sizes(unbroken.model))
    return [difference for difference in found if not difference.right]


def new_lines(config: Config, since: float) -> int:
    log = Path(config.run) / "log.jsonl"
    return sum(line["time"] > since for line in read_log(config.run)) if log.exists() else 0


def newest_step(folder: Path) -> int:
    return int(checkpoints(folder)[0].name.removeprefix("step-")) if checkpoints(folder) else 0


def kill_at_random(config: Config, stream: random.Random, *, saving: bool, resume: bool) -> bool:
    """Kill all processes of the run some time after its next checkpoint, or while the one behind it is written;
    whether that was so."""
    folder = Run(Path(config.run)).checkpoints
    before = newest_step(folder)
    pids = start(config, resume=resume)
    until(lambda: newest_step(folder) > before, pids)
    if saving:
        until(lambda: any(folder.glob("step-*[0-9].tmp")), pids)
        time.sleep(stream.uniform(0, 0.005))
    else:
        time.sleep(stream.uniform(0, 0.05))
    kill(pids)
    return any(folder.glob("step-*[0-9].tmp"))


@pytest.mark.parametrize(
    ("layout", "asynchronous"),
    [("single", True), ("single", False), ("fsdp2", True), ("tp2.sp", False), ("pp2", True)],
)
def test_killed_again_and_again_and_still_the_same_run(layout: str, asynchronous: bool, tmp_path: Path) -> None:
    saves = {"every": 3, "asynchronous": asynchronous}
    evaluations = {"steps": 36, "eval_every": 5, "eval_batches": 1}
    unbroken = settings(tmp_path / "unbroken", layout, train=evaluations, checkpoint=saves)
    train(unbroken)
    broken, stream = cut(unbroken, layout, tmp_path / "broken"), random.Random(f"{layout} {asynchronous}")
    moments = [False, True, False]
    saving = [
        kill_at_random(broken, stream, saving=moment, resume=attempt > 0) for attempt, moment in enumerate(moments)
    ]
    assert any(saving)
    train(broken, resume=True)
    assert differences(unbroken, broken) == []
    assert [line["step"] for line in read_log(broken.run)] == list(range(1, 37))
    assert [line["valid_loss"] for line in read_log(broken.run)] == [
        line["valid_loss"] for line in read_log(unbroken.run)
    ]
    left = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert left == ["step-00000033", "step-00000036"]
    assert all(verify_checkpoint(path).whole for path in checkpoints(tmp_path / "broken" / "checkpoints"))


def test_a_run_killed_at_every_save_comes_to_its_end(tmp_path: Path) -> None:
    unbroken = settings(tmp_path / "unbroken", "fsdp2", train={"steps": 24}, checkpoint={"every": 1})
    train(unbroken)
    broken, stream = cut(unbroken, "fsdp2", tmp_path / "broken"), random.Random(1)
    for attempt in range(3):
        kill_at_random(broken, stream, saving=True, resume=attempt > 0)
    train(broken, resume=True)
    assert differences(unbroken, broken) == []


def test_killed_between_the_save_and_the_next_step(tmp_path: Path) -> None:
    unbroken = settings(tmp_path / "unbroken", checkpoint={"asynchronous": False})
    train(unbroken)
    broken = cut(unbroken, "single", tmp_path / "broken")

    def work(config: Config) -> None:
        def retain(folder: Path, keep: int, saved: Path) -> None:
            if saved.name == "step-00000006":
                os.kill(os.getpid(), signal.SIGKILL)

        save.retain = retain  # type: ignore[attr-defined, assignment]
        trainer.run(config)

    end(start(broken, work=work))
    assert newest_step(tmp_path / "broken" / "checkpoints") == 6
    train(broken, resume=True)
    assert differences(unbroken, broken) == []


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("single", {"kind": "muon"}),
        ("fsdp2.tp2", {"kind": "muon"}),
        ("fsdp2.offloadoptimizer", {}),
        ("fsdp2.tp2", {"states": "8bit"}),
    ],
)
def test_other_optimizers_resume_as_the_same_run(layout: str, optimizer: dict, tmp_path: Path) -> None:
    unbroken = settings(tmp_path / "unbroken", layout, checkpoint={"every": 6}, optimizer=optimizer)
    train(unbroken)
    broken = cut(unbroken, layout, tmp_path / "broken")
    pids = start(broken)
    until(step_path(tmp_path / "broken" / "checkpoints", 6).exists, pids)
    kill(pids)
    train(broken, resume=True)
    assert [d for d in compare(unbroken, broken, 6) if not d.right] == []


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("fsdp2", "tp2", {}),
        ("pp2", "single", {}),
        ("single", "fsdp2.zero1", {}),
        ("fsdp2.tp2", "pp2", {"kind": "muon"}),
        ("fsdp2", "tp2", {"states": "8bit"}),
    ],
)
def test_resumed_under_another_layout(before: str, after: str, optimizer: dict, tmp_path: Path) -> None:
    settled = {"lr": 1e-3, **optimizer}
    unbroken = settings(tmp_path / "unbroken", before, checkpoint={"every": 6}, optimizer=settled)
    train(unbroken)
    broken = cut(unbroken, before, tmp_path / "broken")
    pids = start(broken)
    until(step_path(tmp_path / "broken" / "checkpoints", 6).exists, pids)
    kill(pids)
    resumed = cut(broken, after)
    train(resumed, resume=True)
    assert differences(unbroken, resumed) == []
    states = [read_state(step_path(path / "checkpoints", 12)) for path in (tmp_path / "unbroken", tmp_path / "broken")]
    assert [state["layout"] for state in states] == [before, after]
    assert states[0]["data"] == states[1]["data"]


EXPERTS = {
    "family": "deepseek_v3", "num_kv_heads": 4,
    "latent": {"q_rank": 12, "kv_rank": 16, "nope_dim": 6, "rope_dim": 4, "value_dim": 8},
    "experts": {"num_experts": 4, "per_token": 2, "ffn": 12, "dense_layers": 1, "shared": 1, "scores": "sigmoid"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("fsdp2.ep2", "fsdp2.ep2", "adamw"),
        ("fsdp2.ep2", "tp2.sp", "muon"),
        ("tp2.ep2.etp1", "pp2", "adamw"),
        ("pp2.dp2.ep2.mb2", "fsdp2", "adamw"),
    ],
)
def test_experts_resume_under_any_layout(before: str, after: str, kind: str, tmp_path: Path) -> None:
    """Their optimizer states and the routers' biases too, which move the load of the next steps."""
    balance = {"bias_speed": 0.01, "sequence": 0.1}
    unbroken = settings(
        tmp_path / "unbroken", before, model=EXPERTS, balance=balance, checkpoint={"every": 6},
        optimizer={"lr": 1e-3, "kind": kind}, log={"routing_every": 1},
    )  # fmt: skip
    train(unbroken)
    broken = cut(unbroken, before, tmp_path / "broken")
    pids = start(broken)
    until(step_path(tmp_path / "broken" / "checkpoints", 6).exists, pids)
    kill(pids)
    resumed = cut(broken, after)
    train(resumed, resume=True)
    assert [difference for difference in compare(unbroken, resumed, 6) if not difference.right] == []
    loads = [[line["load"] for line in read_log(run.run, ROUTING)] for run in (unbroken, resumed)]
    assert len(loads[0]) == 12
    assert loads[0] == loads[1]
    biases = [bias_of(run) for run in (unbroken, resumed)]
    assert float(biases[0].abs().max()) > 0.01
    assert torch.equal(*biases)


def bias_of(config: Config) -> Tensor:
    """Of the second block's router, at the end."""
    with WeightsFolder.open(checkpoints(Run(Path(config.run)).checkpoints)[0] / "model") as weights:
        return weights.read(Region.whole("blocks.1.mlp.router.bias", (4,)))


def test_what_differs_is_named(tmp_path: Path) -> None:
    one = settings(tmp_path / "one", checkpoint={"every": 6})
    train(one)
    other = cut(one, "single", tmp_path / "other")
    train(other)
    assert differences(one, other) == []
    name = "exp_avg.blocks.1.mlp.down.weight"
    for path in (tmp_path / "other" / "checkpoints" / "step-00000012" / "optimizer").iterdir():
        with TensorFile(path, writable=True) as file:
            tensor = file.read(name)
            tensor.view(-1)[7] = -tensor.view(-1)[7]
            file.write(name, tensor)
    (found,) = differences(one, other)
    assert (found.kind, found.name, found.step, found.error) == ("exp_avg", "blocks.1.mlp.down.weight", 12, 1)
    found_under_bounds = differences(one, cut(other, "fsdp2"))
    assert [(wrong.kind, wrong.name) for wrong in found_under_bounds] == [("exp_avg", "blocks.1.mlp.down.weight")]
    lines = (tmp_path / "other" / "log.jsonl").read_text().splitlines(keepends=True)
    rate = f'"lr": {json.loads(lines[8])["lr"]}'
    (tmp_path / "other" / "log.jsonl").write_text(
        "".join([*lines[:8], lines[8].replace(rate, '"lr": 1e-9'), *lines[9:]])
    )
    found_under_bounds = differences(one, cut(other, "fsdp2"))
    assert [(wrong.kind, wrong.step) for wrong in found_under_bounds] == [("loss", 9), ("exp_avg", 12)]
    (tmp_path / "other" / "log.jsonl").write_text("".join([*lines[:4], *lines[5:], lines[5]]))
    wrong = [(difference.kind, difference.step) for difference in differences(one, other)]
    assert wrong == [("loss", 5), ("loss", 6), ("exp_avg", 12)]


@pytest.mark.parametrize(("number", "layout"), [(signal.SIGTERM, "single"), (signal.SIGINT, "fsdp2")])
def test_a_signal_saves_at_the_end_of_the_step(number: int, layout: str, tmp_path: Path) -> None:
    long = {"train": {"steps": 40}, "checkpoint": {"every": 0}}
    unbroken = settings(tmp_path / "unbroken", layout, **long)
    train(unbroken)
    broken, begin = cut(unbroken, layout, tmp_path / "broken"), time.time()
    pids = start(broken)
    until(lambda: new_lines(broken, begin) >= 3, pids)
    os.kill(pids[-1], number)  # one rank is asked; all agree
    end(pids)
    assert failures(tmp_path / "broken") == {}
    (saved,) = checkpoints(tmp_path / "broken" / "checkpoints")
    steps = [line["step"] for line in read_log(broken.run)]
    assert steps == list(range(1, read_state(saved)["step"] + 1))
    assert 3 <= len(steps) < 40
    train(broken, resume=True)
    assert differences(unbroken, broken) == []


def test_the_newest_is_damaged_and_the_one_before_goes_on(tmp_path: Path) -> None:
    unbroken = settings(tmp_path / "run", "fsdp2", log={"view": "plain"})
    broken = cut(unbroken, "fsdp2", tmp_path / "broken")
    train(unbroken)
    train(broken)
    damage(tmp_path / "broken" / "checkpoints" / "step-00000012" / "model" / "model.safetensors")
    train(broken, resume=True)
    said = " ".join((tmp_path / "broken" / "output-0.txt").read_text().split())
    assert "skipped a damaged checkpoint: " in said
    assert "step-00000012/model/model.safetensors" in said
    assert "its numbers are not those that were written" in said
    assert "resumed from" in said
    assert "step 9, 72 samples seen" in said
    assert differences(unbroken, broken) == []


def test_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    train(config)
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        damage(path / "optimizer" / "optimizer.safetensors")
    with pytest.raises(AssertionError, match="is whole, and a run does not start over by itself"):
        train(config, resume=True)
    assert read_log(config.run)[-1]["step"] == 12  # nothing was cut


def test_changed_data_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    train(config)
    with open(tmp_path / "tokens.bin", "r+b") as file:
        file.write(b"\x01\x00\x02\x00\x03\x00")
    with pytest.raises(AssertionError, match=r"ValueError: the data of .* have changed since step-00000012"):
        train(config, resume=True)


def damage(file: Path) -> None:
    """One bit in the middle of the numbers."""
    with open(file, "r+b") as opened:
        opened.seek(-40, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-40, os.SEEK_END)
        opened.write(bytes([byte ^ 4]))
