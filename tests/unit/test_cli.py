"""What every verb has in common."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from weft.cli.app import app, main
from weft.cli.options import device_name


def test_a_verb_that_ctrl_c_ends_says_so_and_ends_as_a_shell_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.presets.preset_names", interrupted)
    ended = CliRunner().invoke(app, ["models"])
    assert (ended.exit_code, ended.stderr) == (130, "weft: stopped\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "weft: stopped\n"),  # while the verbs are made
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "weft: error: Not a directory: a/b\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aa"), 2, "weft: error: File name too long: aa\n"),
    ],
)
def test_what_ends_the_command_line(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys.modules[main.__module__], "app", fail)
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


def test_a_plan_begins_with_a_model_or_says_so() -> None:
    ended = CliRunner().invoke(app, ["plan", "--model", "llama3-8b", "--cluster", "h100x8"])
    assert isinstance(ended.exception, ValueError)
    assert "begins with a question or a model, not with --model" in str(ended.exception)
    assert "Usage" in CliRunner().invoke(app, ["plan", "--help"]).stdout


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None  # whoever imports it fails
from typer.testing import CliRunner
from weft.cli.app import app
print(json.dumps([str(CliRunner().invoke(app, command).exception) for command in json.loads(sys.argv[1])]))
"""


def test_a_typing_error_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes seconds; a `--device` or `--dtype` was looked at after it, and a model's folder, a layout, a config."""
    (tmp_path / "config.json").write_text("{}")
    there, nowhere = str(tmp_path), str(tmp_path / "nowhere")
    kind, number, folder = "--device cuad cannot be used", "--dtype bf61: choose fp32", f"there is no folder {nowhere}"
    commands = {
        ("generate", there, "Hi", "--device", "cuad"): kind,
        ("generate", there, "Hi", "--dtype", "bf61"): number,
        ("serve", there, "--device", "cuad"): kind,
        ("serve", there, "--dtype", "bf61"): number,
        ("eval", there, "--text", "text.txt", "--device", "cuad"): kind,
        ("prompt", "chat", "--checkpoint", there, "--device", "cuad"): kind,
        ("prompt", "chat", "--checkpoint", there, "--dtype", "bf61"): number,
        ("verify", "serve", there, "--device", "cuad"): kind,
        ("verify", "serve", there, "--dtype", "bf61"): number,
        ("verify", "serve", there, "--cache-dtype", "int4"): "cache_dtype is int4",
        ("verify", "serve", nowhere): folder,
        ("verify", "export", nowhere): folder,
        ("verify", "layout", "single", "fdsp2"): "'fdsp2' is not understood",
        ("verify", "resume", nowhere): f"there is no config file {nowhere}",
        ("export", there, f"{there}/new", "--dtype", "bf61"): number,
        ("export", there, f"{there}/new", "--dtype", "auto"): "--dtype auto: choose fp32",
        ("export", nowhere, f"{there}/new"): folder,
        ("export", "triton", there, "--out", f"{there}/new", "--dtype", "bf61"): number,
        ("export", "triton", nowhere, "--out", f"{there}/new"): folder,
    }
    code = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([list(command) for command in commands])]
    said = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    for (command, expected), found in zip(commands.items(), said, strict=True):
        assert expected in found, command


def test_devices_that_pytorch_may_have_are_let_through() -> None:
    for name in ("auto", "cpu", "cuda", "cuda:1", "mps"):
        assert device_name(SimpleNamespace(opts=["--device"]), name) == name
    for name in ("cuda1", "cuda:", "cuda:x", "meta", ""):
        with pytest.raises(ValueError, match="--device"):
            device_name(SimpleNamespace(opts=["--device"]), name)
