"""Options of several verbs, which mean a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[Path] | None,
    typer.Argument(help="TOML files with settings; a later one goes over an earlier one.", metavar="[CONFIG.toml]..."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, as key=value: optimizer.lr=3e-4 (repeatable).")
]
Model = Annotated[str | None, typer.Option(help="A preset (see `weft models`): model.preset.")]
LayoutText = Annotated[
    str | None, typer.Option(help="How the work is cut: single, fsdp4.tp2.pp2, dp2.bf16.compile, … (layout).")
]
Data = Annotated[list[str] | None, typer.Option(help="Token files of `weft data prepare` (data.paths; repeatable).")]
