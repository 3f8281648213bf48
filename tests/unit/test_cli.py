"""What every verb has in common."""

from __future__ import annotations

import errno
import sys

import pytest
from typer.testing import CliRunner

from weft.cli.app import app, main


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
