"""`weft verify resume | checkpoint | export | serve`: what is proved, what is named, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import weft.verify.layout
import weft.verify.resume as resume
from weft.checkpoint.tensors import TensorFile
from weft.checkpoint.weights import create_weights_folder
from weft.cli import app
from weft.config.load import make_config
from weft.data.indexed import IndexedDataset
from weft.data.loader import IGNORED
from weft.launch.process import start_process, stop_process
from weft.models.shape import Shape
from weft.serve import engine
from weft.serve.config import EngineConfig
from weft.train.run import Run
from weft.train.trainer import run as train
from weft.verify.checkpoint import verify_checkpoint
from weft.verify.export import verify_export
from weft.verify.layout import Difference, LayoutReport, watched
from weft.verify.report import show_layouts
from weft.verify.runs import RunProcess
from weft.verify.serve import verify_serve
from weft.verify.trace import random_batch, step_file

MODEL = {
    "family": "qwen3", "num_layers": 3, "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn": 48,
    "vocab": 67, "max_seq": 32, "tied": True, "init_std": 0.1,
}  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `weft verify …` in this process."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["weft", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        app.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = make_config({
        "run": str(folder), "model": MODEL,
        "data": {"paths": [resume.write_random_tokens(folder.parent / "tokens", 67, 16)]},
        "train": {"steps": 4, "global_batch": 4, "seq": 16, "device": "cpu"}, "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 2}, "log": {"view": "off", "tensorboard": False},
    })  # fmt: skip
    Run(folder).claim(config, resume=False)
    train(config)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# -- checkpoint -------------------------------------------------------------------------------------------------------


def test_all_checkpoints_of_a_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for path in (finished, finished / "checkpoints"):
        assert call(monkeypatch, "checkpoint", path) == 0
        out = capsys.readouterr().out
        assert out.count("whole") == 2
        lines = [line.split() for line in out.splitlines()]
        assert [line[:2] for line in lines[2:4]] == [["4", "single"], ["2", "single"]]
        size = sum(file.stat().st_size for file in (finished / "checkpoints" / "step-00000004").rglob("*.*"))
        manifest = (finished / "checkpoints" / "step-00000004" / "manifest.json").stat().st_size
        assert f"{size - manifest:,}" in lines[2]
    assert call(monkeypatch, "checkpoint", finished / "checkpoints" / "step-00000002") == 0
    assert capsys.readouterr().out.count("whole") == 1


def test_damage_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    newest = copied / "checkpoints" / "step-00000004"
    with TensorFile(newest / "optimizer" / "optimizer.safetensors", writable=True) as file:
        tensor = file.read("exp_avg.norm.weight")
        tensor[3] += 1
        file.write("exp_avg.norm.weight", tensor)
    (newest / "state.json").unlink()
    (newest / "notes.txt").write_text("mine")
    assert call(monkeypatch, "checkpoint", copied) == 1
    out = capsys.readouterr().out
    assert (out.count("DAMAGED"), out.count("whole")) == (1, 1)
    assert "step-00000004/state.json: is missing" in out
    assert "exp_avg.norm.weight[0:32]: its numbers are not those that were written" in out
    assert "step-00000004/notes.txt: is not part of the checkpoint" in out
    (newest / "manifest.json").write_text("{}")
    assert call(monkeypatch, "checkpoint", newest) == 1
    out = capsys.readouterr().out
    assert "manifest.json does not match its own sha256" in out
    assert "Every byte was compared" not in out


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, sentence in (
        (tmp_path / "no", "is not a folder"), (tmp_path / "run", "is a run without a checkpoint"),
        (tmp_path, "holds no checkpoint: name a run, or one of its"),
    ):  # fmt: skip
        assert call(monkeypatch, "checkpoint", path) == 2
        assert sentence in capsys.readouterr().err


# -- layout and resume, as far as no process is started ---------------------------------------------------------------


def test_a_run_that_fails_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(weft.verify.layout, "launch", lambda *args, **options: 1)
    assert call(monkeypatch, "layout", "single", "tp2") == 1
    assert capsys.readouterr().err == "a: single …\nweft: error: the run under layout single failed, or was ended\n"


def test_how_far_a_trace_is_can_be_watched(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with watched(tmp_path, 3, lambda *words: told.append(words), "a: single"):
        for step in range(3):  # that of step 0 are the weights from which it begins
            step_file(tmp_path, step).touch()
    assert told[-1] == ("a: single", 2, 3)


@pytest.mark.parametrize("words", [("layout", "single", "tp2"), ("resume",)])
def test_traces_are_kept_in_a_folder_of_their_own(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    for keep, sentence in (
        (tmp_path, f"--keep {tmp_path} is not empty: name a new folder"),
        (tmp_path / "file", f"{tmp_path}/file cannot be made a folder (File exists): name another place"),
    ):
        assert call(monkeypatch, *words, "--keep", keep) == 2
        assert capsys.readouterr().err == f"weft: error: {sentence}\n"


# -- export -----------------------------------------------------------------------------------------------------------


def test_transformers_computes_the_same(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "export", finished) == 0
    out = capsys.readouterr().out
    assert "step-00000004/model: weft's Decoder  against  transformers' Qwen3ForCausalLM" in out
    assert "transformers computes what weft computes." in out
    report = verify_export(finished / "checkpoints" / "step-00000004" / "model")
    assert [stage.name for stage in report.stages] == ["blocks.0", "blocks.1", "norm", "logits"]
    assert 0 < max(stage.error for stage in report.stages) < 2e-6
    assert (report.agreed, report.tokens) == (16, 16)


def test_where_they_part_ways_is_named(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = copied / "checkpoints" / "step-00000004" / "model"
    real = verify_export.__globals__["load_decoder"]

    def changed(*args: object, **options: object) -> object:
        shape, decoder = real(*args, **options)
        with torch.no_grad():
            decoder.blocks["1"].mlp.down.weight[0] += 0.5
        return shape, decoder

    monkeypatch.setitem(verify_export.__globals__, "load_decoder", changed)
    assert call(monkeypatch, "export", model) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "transformers does not compute what weft computes. They part ways at blocks.1." in out
    monkeypatch.setitem(verify_export.__globals__, "load_decoder", real)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5, "attention_bias": False}))
    assert call(monkeypatch, "export", model) == 0  # both read the same, other, model


@pytest.mark.parametrize(("step", "told"), [(1, False), (2, True)])
def test_a_token_between_two_experts_is_told_of(step: int, told: bool, capsys: pytest.CaptureFixture) -> None:
    """Rounding may send it to either; but not in the first step, where both runs have the same weights."""
    name = "blocks.0.mlp.experts.3.up.weight"
    found = [Difference("output", "norm", 1, 1e-7, 1e-5), Difference("gradient", name, step, 0.1, 1e-5)]
    report = LayoutReport(("single", "dp2"), found, ["norm"], [name])
    show_layouts(report, Console(width=100))
    out = capsys.readouterr().out
    assert f"They part ways at {name} (gradient)." in " ".join(out.split())
    assert ("Two experts may have suited a token alike" in out) == told
    dense = LayoutReport(report.layouts, [found[0], replace(found[1], name="head.weight")], ["norm"], ["head.weight"])
    assert not dense.may_be_a_tie


def test_what_transformers_does_not_take_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its kernel for experts wants rows of a multiple of 16 bytes, and its configurations have rules of their own."""
    odd = Shape.model_validate({
        "family": "mixtral", "num_layers": 1, "hidden": 24, "num_heads": 3, "ffn": 33, "vocab": 31, "max_seq": 16,
        "experts": {"num_experts": 4, "per_token": 1},
    })  # fmt: skip
    create_weights_folder(tmp_path / "odd", odd, torch.float32).close()
    assert call(monkeypatch, "export", tmp_path / "odd") == 2
    assert "odd, and does not compute it: " in " ".join(capsys.readouterr().err.split())
    uneven = Shape(num_layers=1, hidden=24, num_heads=3, ffn=32, vocab=31, max_seq=16)
    create_weights_folder(tmp_path / "uneven", uneven, torch.float32).close()
    config = json.loads((tmp_path / "uneven" / "config.json").read_text())
    config |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    (tmp_path / "uneven" / "config.json").write_text(json.dumps(config))
    assert call(monkeypatch, "export", tmp_path / "uneven") == 2
    assert "transformers does not load" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "uneven" / "config.json").write_text("5")
    assert call(monkeypatch, "export", tmp_path / "uneven") == 2
    assert "transformers does not load" in " ".join(capsys.readouterr().err.split())
    os.truncate(tmp_path / "odd" / "model.safetensors", 600)
    assert call(monkeypatch, "export", tmp_path / "odd") == 2
    assert "transformers does not load" in " ".join(capsys.readouterr().err.split())


def test_a_tensor_that_transformers_misses(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    globals_ = verify_export.__globals__
    model = copied / "checkpoints" / "step-00000004" / "model"
    real = globals_["load_reference"]
    monkeypatch.setitem(globals_, "load_reference", lambda folder: (real(folder)[0], ["missing model.norm.weight"]))
    report = verify_export(model)
    assert not report.right
    assert report.first_wrong() == "the tensors: missing model.norm.weight"


def test_without_transformers(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert call(monkeypatch, "export", finished) == 2
    assert capsys.readouterr().err == (
        "weft: error: weft verify export compares with transformers, which is not installed: pip install transformers\n"
    )


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Exit codes of the processes that were killed."""
    codes: list[tuple[int, ...]] = []
    real = RunProcess.kill

    def kill(self: RunProcess) -> None:
        real(self)
        codes.append((self.launcher.returncode,))

    monkeypatch.setattr(RunProcess, "kill", kill)
    return codes


@pytest.mark.slow
def test_a_real_kill_and_a_resume_under_another_layout(
    killed: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    keep = tmp_path / "kept"
    options = ("--batch", 4, "--seq", 16, "--steps", 3, "--keep", keep, "--set", "optimizer.lr=1e-3")
    assert call(monkeypatch, "resume", "--layout", "fsdp2", "--resume-layout", "single", *options) == 0
    out, error = capsys.readouterr()
    assert killed == [(-signal.SIGKILL,)] * len(killed)
    assert killed
    assert "The resumed run is the run without a break, within the bounds of parity." in out
    assert "resumed from the checkpoint of step 3" in out
    assert error.split(" …\n") == ["without a break", "to be killed", "killed, resumed", ""]
    assert {"killed", "unbroken"} <= {path.name for path in keep.iterdir()}


def test_a_wrong_resume_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = [resume.Difference("loss", "loss", step, 0.0, 0.0) for step in (1, 2)]
    wrong = resume.Difference("exp_avg", "blocks.0.mlp.up.weight", 2, 17.0, 0.0)
    report = resume.ResumeReport(("fsdp2", "fsdp2"), 1, resume.Death(1, True), [*right, wrong])
    monkeypatch.setattr(resume, "verify_resume", lambda *args: report)
    assert call(monkeypatch, "resume") == 1
    out = capsys.readouterr().out
    assert "SIGKILL while saving step 2, after step 1" in out
    assert "The resumed run is another one. First difference: exp_avg blocks.0.mlp.up.weight, step 2." in out


def test_settings_that_no_run_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for options, sentence in (
        (["--resume-layout", "tp3"], "layout.tp = 3 does not divide model.num_heads = 4"),
        (["--steps", 2, "--set", "schedule.warmup=50"], "schedule.warmup = 50 leaves nothing of train.steps = 4"),
        (["no.toml"], "there is no config file no.toml"),
    ):
        assert call(monkeypatch, "resume", *options) == 2
        assert sentence in capsys.readouterr().err


def test_the_second_layout_is_looked_at_before_the_first_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def launched(*_: object, **__: object) -> int:
        raise AssertionError("it ran")

    monkeypatch.setattr(weft.verify.layout, "launch", launched)
    assert call(monkeypatch, "layout", "single", "tp3") == 2
    assert "layout.tp = 3 does not divide model.num_heads = 4" in capsys.readouterr().err


def test_a_run_that_fails_is_told_in_its_words(tmp_path: Path) -> None:
    broken = make_config({"model": MODEL, "run": str(tmp_path / "run"), "data": {"paths": [str(tmp_path / "none")]}})
    with pytest.raises(ValueError, match="none") as refused, RunProcess(broken) as run:
        run.wait(lambda step: None)
    assert not str(refused.value).startswith("weft")
    assert run.launcher.returncode == 2


def test_random_tokens_are_the_same_each_time(tmp_path: Path) -> None:
    one, other = (IndexedDataset(resume.write_random_tokens(tmp_path / name, 67, 16)) for name in "ab")
    assert (one.tokens == other.tokens).all()
    assert (one.num_documents, int(one.tokens.max())) == (100, 66)


def test_starting_needs_no_torch() -> None:
    code = "import sys, weft.cli.verify, weft.verify.runs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_process_group_is_gone() -> None:
    """Or the tests after these would fork it."""
    start_process("cpu")
    stop_process()
    assert not torch.distributed.is_initialized()


# -- serve ------------------------------------------------------------------------------------------------------------


def test_server_and_trainer_agree_and_a_certificate_says_so(
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert call(monkeypatch, "serve", copied) == 0
    said = capsys.readouterr().out
    assert "trainer in fp32  against  server in fp32\n" in said
    assert "The server says what the trainer computes." in said
    assert call(monkeypatch, "serve", copied, "--dtype", "bfloat16") == 0
    assert "server in bf16\n" in capsys.readouterr().out
    step = copied / "checkpoints" / "step-00000004"
    certificate = json.loads((step / "parity.json").read_text())
    assert certificate["weights"] == json.loads((step / "manifest.json").read_text())["sha256"]
    exact, rounded = certificate["proofs"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert 0 < exact["largest"] < 1e-5 < rounded["largest"] < 0.2
    assert exact["top1"] == 1
    assert exact["tokens"] == rounded["tokens"] == 4 * (15 + 16) + 4 * 16
    report = verify_checkpoint(step)
    assert report.whole
    assert not report.findings
    assert call(monkeypatch, "serve", copied) == 0
    again = json.loads((step / "parity.json").read_text())["proofs"]
    assert [proof["dtype"] for proof in again] == ["bfloat16", "float32"], "one for each kind"
    capsys.readouterr()
    assert call(monkeypatch, "serve", copied, "--cache-dtype", "int8") == 0
    assert "keys and values in 8 bits" in " ".join(capsys.readouterr().out.split())
    *others, small = json.loads((step / "parity.json").read_text())["proofs"]
    assert (len(others), small["dtype"], small["cache"]) == (2, "float32", "int8")
    assert 1e-5 < small["mean"] < small["largest"] < 0.2


def test_a_server_of_other_weights_is_found_out(
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    real = engine.load_decoder

    def changed(*arguments: object, **options: object) -> object:
        shape, model = real(*arguments, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            model.blocks["1"].attention.out.weight.mul_(-1)
        return shape, model

    monkeypatch.setattr(engine, "load_decoder", changed)
    assert call(monkeypatch, "serve", copied) == 1
    assert "The server says something else." in capsys.readouterr().out
    report = verify_serve(copied, EngineConfig())
    assert not report.right
    assert report.largest > 1e-3


@pytest.mark.parametrize("mask", [False, True])
def test_random_rows_are_those_of_any_cut_and_have_unequal_numbers_of_targets(mask: bool) -> None:
    config = make_config({"model": MODEL, "train": {"global_batch": 4, "seq": 16}, "data": {"document_mask": mask}})
    whole, cut = random_batch(config, 1, range(4)), random_batch(config, 1, range(2, 4))
    for one, other in zip(asdict(whole).values(), asdict(cut).values(), strict=True):
        assert (one is None and other is None) or np.array_equal(one[2:], other)
    assert len({int(count) for count in (whole.targets != IGNORED).sum(axis=1)}) > 1
    assert (whole.documents is not None) == mask
