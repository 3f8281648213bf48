"""What every verb has in common."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from weft.cli.app import app


def test_a_verb_that_ctrl_c_ends_says_so_and_ends_as_a_shell_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.presets.preset_names", interrupted)
    ended = CliRunner().invoke(app, ["models"])
    assert (ended.exit_code, ended.stderr) == (130, "weft: stopped\n")
