"""`weft train` as a user meets it, and what a trainer does when numbers go wrong."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from forked import SHAPE, cut, failures, settings, train, until

from weft.checkpoint import save
from weft.checkpoint.folder import checkpoints
from weft.checkpoint.load import read_state
from weft.checkpoint.region import Region
from weft.checkpoint.weights import WeightsFolder
from weft.checkpoint.write import DiskFullError, write_checkpoint
from weft.cli import app
from weft.cli import train as cli_train
from weft.config.load import load_config, make_config, merge
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.data.indexed import IndexedDataset, IndexedWriter
from weft.data.loader import Loader
from weft.launch.process import start_process
from weft.train import hardware, trainer
from weft.train.data import open_loader
from weft.train.log import read_log
from weft.train.run import CONFIG
from weft.train.trainer import Trainer
from weft.verify.continuation import compare

# -- the command ------------------------------------------------------------------------------------------------------


def toml(config: Config, file: Path) -> Path:
    file.write_text(config_toml(config))
    return file


def weft(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(
        [sys.executable, *before, "-m", "weft", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**env, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_then_torchrun_is_the_run_without_a_break(tmp_path: Path) -> None:
    unbroken = settings(tmp_path / "unbroken", "fsdp2", train={"steps": 50}, checkpoint={"every": 0})
    train(unbroken)
    broken = cut(unbroken, "fsdp2", tmp_path / "broken")
    file, log = toml(broken, tmp_path / "broken.toml"), tmp_path / "broken" / "log.jsonl"
    run = weft("train", file, "--set", 'log.view="plain"')
    until(lambda: (log.exists() and log.read_text().count("\n") >= 2) or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=300)
    assert (run.returncode, error) == (0, "")
    (saved,) = checkpoints(tmp_path / "broken" / "checkpoints")
    step = read_state(saved)["step"]
    assert 2 <= step < 50
    assert f"asked to stop: step {step} is saved; --resume goes on from there" in " ".join(out.split())
    assert str(saved) in out
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0")  # fmt: skip
    resumed = weft("train", file, "--resume", before=torchrun)
    _, error = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, error
    assert [difference for difference in compare(unbroken, broken, 25) if not difference.right] == []


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_terminal_that_is_closed_loses_nothing(layout: str, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", layout, train={"steps": 5000}, checkpoint={"every": 0}, log={"view": "auto"})
    file, log = toml(config, tmp_path / "run.toml"), tmp_path / "run" / "log.jsonl"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "weft", "train", str(file)])
    until(lambda: log.exists() and log.read_text().count("\n") >= 2)
    os.close(terminal)
    os.waitpid(pid, 0)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert read_log(config.run)[-1]["step"] == read_state(saved)["step"] < 5000


def test_a_mistake_that_one_rank_meets_is_told_once(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dp2")
    data = IndexedDataset(config.data.paths[0])
    tokens = np.memmap(data.bin_path, data.dtype, "r+")
    batch = open_loader(config, "train", check_tokens=True).batch(0, range(4, 8))
    window = batch.tokens[2][:9]
    starts = [i for i in range(len(tokens) - 9) if (tokens[i : i + 9] == window).all()]
    assert len(starts) == 1
    tokens[starts[0] + 4] = 99  # in the first step, in a row of rank 1
    tokens.flush()
    stat = data.bin_path.stat()  # a report that says what is not so: else it would be found before anything starts
    report = {"bin_bytes": stat.st_size, "bin_mtime_ns": stat.st_mtime_ns, "max_token": 66}
    Path(f"{data.prefix}.json").write_text(json.dumps(report))
    run = weft("train", toml(config, tmp_path / "run.toml"))
    out, error = run.communicate(timeout=300)
    assert run.returncode == 2
    assert error == f"weft: error: rank 1 of 2: token id 99 in {data.prefix} is outside the vocabulary of 67\n"
    assert "Traceback" not in out
    assert "outside the vocabulary" in (tmp_path / "run" / "logs" / "rank1.log").read_text()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The settings that `weft train` would have started with."""
    configs: list[Config] = []
    monkeypatch.setattr(cli_train, "check", lambda config, resume: None)
    monkeypatch.setattr(cli_train, "start", lambda config, resume, request: configs.append(config) or 0)
    return configs


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        app.main()
    return int(end.value.code or 0)


def test_flags_go_over_files_and_set_over_flags(
    captured: list[Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('run = "a"\n[model]\npreset = "gpt2-124m"\n[train]\nsteps = 7\nseed = 3\n[optimizer]\nlr = 1.0\n')
    second.write_text('layout = "fsdp2.bf16"\n[train]\nsteps = 8\n')
    flags = ("--seq", 32, "--batch", 4, "--lr", 0.5, "--data", "x", "--data", "y", "--run", "b")
    code = call(monkeypatch, "train", first, second, *flags, "--set", "optimizer.lr=3e-4", "--set", "layout.tp=2")
    assert code == 0
    (config,) = captured
    assert (config.train.steps, config.train.seed, config.train.seq, config.train.global_batch) == (8, 3, 32, 4)
    assert (config.optimizer.lr, config.run, config.data.paths) == (3e-4, "b", ("x", "y"))
    assert str(config.layout) == "fsdp2.tp2.bf16"
    assert config.model.num_layers == 12


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "optimizer.lrr=1"], "unknown setting 'optimizer.lrr': did you mean 'lr'?"),
        (["--set", "train.steps=many"], "train.steps = 'many': input should be a valid integer"),
        (["--set", "optimizer.lr"], "--set 'optimizer.lr': write it as key=value"),
        (["--set", "optimizer.lr=-1"], "optimizer.lr = -1: input should be greater than 0"),
        (["--layout", "fsdp2.tq2"], "layout 'fsdp2.tq2': 'tq2' is not understood"),
        (["--layout", "tp5"], "layout.tp = 5 does not divide model.num_heads = 12"),
        (["--layout", "fsdp3"], "train.global_batch = 8 is not a multiple of dp·fsdp = 3"),
        (["--layout", "sp"], "layout.sp cuts the sequence over the tp axis: set layout.tp above 1"),
        (["--layout", "pp13", "--batch", "13"], "layout.pp = 13 stages need as many blocks; model.num_layers = 12"),
        (["--model", "gpt9"], "gpt9"),
        (["--seq", "9999"], "train.seq = 9999 is longer than the 1024 learned positions"),
        (["--steps", "5", "--set", "schedule.warmup=9"], "schedule.warmup = 9 leaves nothing of train.steps = 5"),
        (["no.toml"], "there is no config file no.toml"),
        ([], "data.paths is empty: name at least one prefix made by `weft data prepare`"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_one_clear_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "train", "--model", "gpt2-124m", *arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("weft: error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_started_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", train={"steps": 1})
    train(config)
    file = toml(config, tmp_path / "run.toml")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert call(monkeypatch, "train", file) == 2
    assert "holds a run with checkpoints: go on with --resume, or give the new run" in capsys.readouterr().err
    for change, name in (
        ("train.seed=5", "train.seed"),
        ("model.ffn=96", "model"),
        ("data.split=[1, 1, 0]", "data.split"),
    ):
        assert call(monkeypatch, "train", file, "--resume", "--set", change) == 2
        assert f"was trained with another {name}: " in capsys.readouterr().err
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    assert load_config([tmp_path / "run" / CONFIG]) == config


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[Config, int, list[int]]:
    """A run from weights whose row of token 66 is not a number, the step that meets it first, and in which samples."""
    first = settings(tmp_path / "first", train={"steps": 1})
    model = tmp_path / "poisoned"
    shutil.copytree(train(first) / "model", model)
    with WeightsFolder.open(model, writable=True) as weights:
        row = Region.whole("embed.weight", (67, SHAPE["hidden"])).narrow(0, 66, 67)
        weights.write(row, torch.full(row.dims, math.nan))
    data = IndexedDataset(first.data.paths[0])
    tokens = np.memmap(data.bin_path, data.dtype, "r+")
    tokens[tokens == 66] = 0
    config = settings(tmp_path / "run", train={"init_from": str(model)}, optimizer={"lr": 1e-3})
    loader = open_loader(config, "train", check_tokens=True)
    # a place that step 5 reads: the first token of its sixth row
    window = loader.batch(4 * 8, range(5, 6)).tokens[0]
    (start,) = [i for i in range(len(tokens) - 16) if (tokens[i : i + 16] == window).all()]
    tokens[start + 3] = 66
    tokens.flush()
    read = [loader.batch(8 * step) for step in range(12)]
    samples = [int(batch.samples[row]) for batch in read for row in np.flatnonzero((batch.tokens == 66).any(axis=1))]
    assert samples == [4 * 8 + 5]
    return config, 5, samples


@pytest.mark.parametrize("layout", ["single", "fsdp2", "tp2", "pp2.mb2"])
def test_a_loss_that_is_no_number_stops_before_the_update(layout: str, poisoned: tuple[Config, int, list[int]]) -> None:
    config, step, (sample,) = poisoned
    config = make_config(merge(config.model_dump(), {"layout": layout, "checkpoint": {"keep": 1}}))

    def work(config: Config) -> None:
        with Trainer(config, start_process("cpu", layout=config.layout)) as trainer:
            make, before = trainer.train_step, []

            def watched(*args: object) -> object:
                before[:] = [weight.data.clone() for weight in trainer.training.woven.weights]
                return make(*args)  # type: ignore[arg-type]

            trainer.train_step = watched  # type: ignore[method-assign, assignment]
            with pytest.raises(ValueError, match="Nothing was updated") as stopped:
                trainer.train()
            for old, weight in zip(before, trainer.training.woven.weights, strict=True):
                assert torch.equal(old.view(torch.int32), weight.data.view(torch.int32)), weight.name
            assert trainer.training.optimizer.updates == trainer.step == step - 1
            raise stopped.value

    with pytest.raises(AssertionError):
        train(config, work=work)
    told = failures(Path(config.run))
    assert len(told) == config.layout.world
    for text in told.values():
        assert (
            f"ValueError: step {step}, samples 32 to 39: the loss is nan, because of sample {sample}. Nothing" in text
        )
        assert "--set train.nonfinite=skip" in text
    assert len(read_log(config.run)) == step - 1
    saved = [path.name for path in checkpoints(Path(config.run) / "checkpoints")]
    assert saved == ["step-00000004", "step-00000003"]  # all that was done; and the one before, if that is to blame


def test_a_bad_step_is_left_out_where_that_is_asked(poisoned: tuple[Config, int, list[int]], tmp_path: Path) -> None:
    config, step, (sample,) = poisoned
    with pytest.raises(AssertionError, match=f"because of sample {sample}"):
        train(config)
    skip = Config.model_validate({**config.model_dump(), "train": {**config.train.model_dump(), "nonfinite": "skip"}})
    train(skip, resume=True)
    log = read_log(config.run)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert [line["step"] for line in log if line["skipped"]] == [step]
    assert log[step - 1]["loss"] is None
    assert all(math.isfinite(line["loss"]) for line in log if not line["skipped"])
    assert read_state(checkpoints(Path(config.run) / "checkpoints")[0])["optimizer_updates"] == 11
    whole = cut(skip, "single", tmp_path / "whole")
    train(whole)  # skipped at the first try
    assert [difference for difference in compare(whole, skip, 6) if not difference.right] == []


def test_an_fp16_overflow_halves_the_scale_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_measured", lambda *which: 1e9)  # takes many seconds in fp16 on a CPU
    config = settings(tmp_path / "run", "fp16", log={"view": "plain"}, checkpoint={"every": 0})

    def work(config: Config) -> None:
        with Trainer(config, start_process("cpu", layout=config.layout)) as trainer:
            trainer.training.scaler.scale = 2.0**26
            trainer.train()

    state = read_state(train(config, work=work))
    skipped = [line["step"] for line in read_log(config.run) if line["skipped"]]
    assert skipped == list(range(1, len(skipped) + 1))
    assert 1 <= len(skipped) < 12
    assert state["loss_scaler"] == {
        "scale": 2.0 ** (26 - len(skipped)),
        "good_steps": 12 - len(skipped),
        "active": True,
    }
    assert state["optimizer_updates"] == 12 - len(skipped)
    said = " ".join((tmp_path / "run" / "output-0.txt").read_text().split())
    assert f"step 1: fp16 overflow, loss scale now {2.0**25:g}" in said


# -- saves that fail --------------------------------------------------------------------------------------------------


def fail_at(steps: set[int], config: Config) -> None:
    """Train where nothing can be written at some steps."""

    def write(plan: Any, agreement: Any, step: int, *rest: Any) -> Path:
        if step in steps:
            raise DiskFullError(step, 0, "no space left on device")
        return write_checkpoint(plan, agreement, step, *rest)

    save.write_checkpoint = write  # type: ignore[attr-defined]
    trainer.run(config)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_where_a_save_fails(asynchronous: bool, tmp_path: Path) -> None:
    saves = {"asynchronous": asynchronous, "keep": 9}
    config = settings(tmp_path / "run", "dp2", checkpoint=saves, log={"view": "plain"})
    train(config, work=partial(fail_at, {3, 9}))
    saved = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == ["step-00000012", "step-00000006"]
    said = " ".join((tmp_path / "run" / "output-0.txt").read_text().split())
    for step in (3, 9):
        assert f"the checkpoint of step {step} was not saved: rank 0: no space left on device; training goes on" in said


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_last_save_that_fails_is_an_error(asynchronous: bool, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", checkpoint={"asynchronous": asynchronous})
    with pytest.raises(AssertionError, match="the checkpoint of step 12 was not saved: rank 0: no space left"):
        train(config, work=partial(fail_at, {12}))
    assert [line["step"] for line in read_log(config.run)] == list(range(1, 13))
    train(config, resume=True)  # the last three steps again
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000012"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_old_checkpoint_that_does_not_go_is_no_error(asynchronous: bool, tmp_path: Path) -> None:
    """Somebody copies it, over NFS. The last one is saved and whole: a job that will go on must not end in an error."""

    def work(config: Config) -> None:
        def busy(*_: object) -> None:
            raise OSError(16, "Device or resource busy")

        save.retain = busy  # type: ignore[attr-defined]
        trainer.run(config)

    config = settings(tmp_path / "run", "dp2", checkpoint={"asynchronous": asynchronous}, log={"view": "plain"})
    assert train(config, work=work).name == "step-00000012"
    said = " ".join((tmp_path / "run" / "output-0.txt").read_text().split())
    for step in (3, 6, 9, 12):
        assert (
            f"the checkpoint of step {step} is saved, but older ones could not be removed: rank 0: [Errno 16]" in said
        )
    assert f"saved step {12}" in said


def test_asked_to_stop_where_nothing_can_be_saved(tmp_path: Path) -> None:
    def work(config: Config) -> None:
        real = Trainer.report

        def report(self: Trainer, *what: Any) -> None:
            real(self, *what)
            if self.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        Trainer.report = report  # type: ignore[method-assign]
        fail_at({5}, config)

    config = settings(tmp_path / "run", checkpoint={"asynchronous": False}, log={"view": "plain"})
    with pytest.raises(AssertionError, match="the checkpoint of step 5 was not saved"):
        train(config, work=work)
    assert "is saved; --resume" not in (tmp_path / "run" / "output-0.txt").read_text()


# -- evaluation, and what comes out -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run that was evaluated at its last step."""
    evaluations = {"steps": 6, "eval_every": 3, "eval_batches": 3}
    config = settings(tmp_path_factory.mktemp("evaluated") / "run", train=evaluations, optimizer={"lr": 1e-3})
    train(config)
    return config


@pytest.mark.parametrize("layout", ["fsdp2", "tp2.sp", "pp2", "dp2"])
def test_every_layout_evaluates_alike(evaluated: Config, layout: str, tmp_path: Path) -> None:
    config = cut(evaluated, layout, tmp_path / "run")
    train(config)
    expected, found = (
        [line["valid_loss"] for line in read_log(run) if line["valid_loss"] is not None]
        for run in (evaluated.run, config.run)
    )
    assert len(expected) == 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_validation_part_without_anything_to_predict_ends_no_run(tmp_path: Path) -> None:
    """Documents of one token, whose next one is another's."""
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        for document in range(1000):
            writer.add(np.full(33 if document < 800 else 1, document % 67))
    masked = {"paths": [str(tmp_path / "tokens")], "split": [80, 20, 0], "document_mask": True}
    config = settings(tmp_path / "run", data=masked, train={"steps": 2, "eval_every": 1, "eval_batches": 1})
    train(config)
    assert [line["valid_loss"] for line in read_log(config.run)] == [None, None]
    assert all(line["loss"] for line in read_log(config.run))


def test_transformers_has_the_loss_of_the_trainer(evaluated: Config) -> None:
    (newest, *_) = checkpoints(Path(evaluated.run) / "checkpoints")
    model = transformers.AutoModelForCausalLM.from_pretrained(newest / "model", dtype=torch.float32)
    loader = open_loader(evaluated, "valid", check_tokens=False)
    losses = []
    with torch.inference_mode():
        for index in range(3):
            batch = loader.batch(8 * index)
            logits = model(torch.as_tensor(batch.tokens)).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), torch.as_tensor(batch.targets).flatten()).item())
    assert sum(losses) / 3 == pytest.approx(read_log(evaluated.run)[-1]["valid_loss"], rel=1e-6)


def test_the_log_says_what_a_step_cost(evaluated: Config) -> None:
    log = read_log(evaluated.run)
    assert [line["tokens"] for line in log] == [8 * 16 * step for step in range(1, 7)]
    assert re.fullmatch(r"[0-9.e+-]+", str(log[-1]["tokens_per_second"]))


# -- what processes do not share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "told"), [
    ({"optimizer": {"lr": 2e-2}}, "rank 1 was started with optimizer.lr = 0.02, and rank 0 with 0.01: give every"),
    ({"train": {"seed": 7}}, "rank 1 was started with train.seed = 7, and rank 0 with 0: give every"),
])  # fmt: skip
def test_processes_with_other_settings_are_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    def work(config: Config) -> None:
        trainer.run(config if os.environ["RANK"] == "0" else make_config(merge(config.model_dump(), change)))

    config = settings(tmp_path / "run", "dp2")
    with pytest.raises(AssertionError, match=told):
        train(config, work=work)
    assert [told in text for text in failures(tmp_path / "run").values()] == [True, True]
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_machine_with_other_data_is_refused(tmp_path: Path) -> None:
    """Each machine has a copy of the data on its own disk, and one of them is old."""
    config = settings(tmp_path / "run", "dp2")
    old = tmp_path / "old" / "tokens"
    old.parent.mkdir()
    for file in (".bin", ".idx"):
        shutil.copy(tmp_path / f"tokens{file}", old.with_suffix(file))
    tokens = np.memmap(old.with_suffix(".bin"), IndexedDataset(old).dtype, "r+")
    tokens[3] += 1
    tokens.flush()

    def work(config: Config) -> None:
        real = trainer.open_loader

        def on_its_disk(config: Config, *rest: Any, **more: Any) -> Loader:
            return real(make_config(merge(config.model_dump(), {"data": {"paths": [str(old)]}})), *rest, **more)

        if os.environ["RANK"] == "1":
            trainer.open_loader = on_its_disk  # type: ignore[attr-defined]
        trainer.run(config)

    with pytest.raises(
        AssertionError, match=r"rank 1 was started with data = \w+, and rank 0 with \w+: give every machine"
    ):
        train(config, work=work)
