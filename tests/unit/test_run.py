"""The folder of a run: who may begin there, who may go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints import save_step
from weft.cli.train import check, check_beginning
from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.train.run import CONFIG, Run, check_same_run

TREE: dict = {
    "model": {"family": "llama", "num_layers": 2, "hidden": 32, "num_heads": 4, "ffn": 48, "vocab": 67, "max_seq": 32},
    "data": {"paths": ["a", "b"], "weights": [0.25, 0.75]},
    "train": {"steps": 10, "seq": 16},
}


def config(**over: object) -> Config:
    return make_config(merge(TREE, over))


def with_checkpoint(path: Path) -> Run:
    run = Run(path)
    run.claim(config(), resume=False)
    (run.checkpoints / "step-00000003").mkdir(parents=True)
    return run


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_is_made_and_holds_the_settings(resume: bool, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "deep")
    run.claim(config(), resume)
    assert run.config() == config()
    assert [file.name for file in run.path.iterdir()] == [CONFIG]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(ValueError, match=rf"{path} cannot be made a folder \(.+\): name another place"),
            Run(path).held(),
        ):
            pass


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="may not be written by you, or at all: name another"), Run(tmp_path).held():
        pass


def test_a_beginning_that_cannot_be_is_refused_before_any_process(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    step = save_step(tmp_path / "source", tmp_path / "run", 3)
    check_beginning(step / "model")
    for path, sentence in (
        (tmp_path / "none", f"there is no folder {tmp_path}/none"),
        (tmp_path / "run", f"run is no Hugging Face folder: name the one in it, {step}/model"),
        (step, f"{step} is no Hugging Face folder: name the one in it, {step}/model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check(config(train={"init_from": str(path)}), resume=False)


def test_a_run_that_never_saved_may_begin_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.claim(config(), resume=False)
    (run.checkpoints / "step-00000003.tmp").mkdir(parents=True)  # what a killed save leaves behind is no checkpoint
    changed = config(train={"seed": 4})
    run.claim(changed, resume=False)
    assert run.config() == changed


def test_a_run_with_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    run = with_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with checkpoints: go on with --resume, or give .* --run"):
        run.claim(config(train={"steps": 11}), resume=False)
    assert run.config() == config()


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("model", {"model": {"ffn": 64}}),
        ("train.seed", {"train": {"seed": 1}}),
        ("train.seq", {"train": {"seq": 8}}),
        ("data.paths", {"data": {"paths": ["b", "a"]}}),
        ("data.weights", {"data": {"weights": [0.5, 0.5]}}),
        ("data.split", {"data": {"split": [90, 10, 0]}}),
        ("data.document_mask", {"data": {"document_mask": True}}),
    ],
)
def test_another_run_is_not_resumed(setting: str, change: dict, tmp_path: Path) -> None:
    run = with_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=f"was trained with another {setting}: .*Put it back to resume"):
        run.claim(config(**change), resume=True)
    assert run.config() == config()


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "fsdp2.tp2"},
        {"train": {"steps": 20, "nonfinite": "skip", "global_batch": 16}},
        {"optimizer": {"lr": 1e-5}},
        {"log": {"every": 5}, "checkpoint": {"keep": 5}},
        {"run": "moved"},
    ],
)
def test_what_may_change(change: dict, tmp_path: Path) -> None:
    run = with_checkpoint(tmp_path)
    changed = config(**change)
    run.claim(changed, resume=True)
    assert run.config() == changed


def test_the_sequence_may_be_named_or_left_to_the_model() -> None:
    check_same_run(config(train={"seq": 0}), config(train={"seq": 32}), Path("run"))


def test_data_may_be_named_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_same_run(config(data={"paths": ["a", "c"]}), config(data={"paths": [str(tmp_path / "a"), "c"]}), Path("run"))
    with pytest.raises(ValueError, match=r"another data\.paths"):
        check_same_run(config(data={"paths": ["a", "c"]}), config(data={"paths": ["b", "c"]}), Path("run"))


def test_settings_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_checkpoint(tmp_path)

    def killed(*names: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.claim(config(layout="fsdp2"), resume=True)
    assert run.config() == config()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=CONFIG):
        Run(tmp_path / "none").config()


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.held(), pytest.raises(ValueError, match=r"another job is training in .*run now.*--run"), run.held():
        pass
    with run.held():
        run.claim(config(), resume=False)
