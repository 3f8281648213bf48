"""Options of several verbs, which mean a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from weft.config.dtypes import torch_name

DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")
"""Kinds that PyTorch computes on."""


def device_name(parameter: typer.CallbackParam, value: str) -> str:
    """Callback of an option: a typing error is told before torch is imported, which takes seconds.

    Raises:
        ValueError: no device has such a name.
    """
    if value != "auto" and not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", value):
        raise ValueError(f"{parameter.opts[0]} {value} cannot be used: name {', '.join(DEVICES)}, cuda:1, … or auto")
    return value


def dtype_name(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Callback of an option, as `device_name`.

    Raises:
        ValueError: no dtype that a model may have is called so.
    """
    if value is not None and value != parameter.default:
        torch_name(value)
    return value


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
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, …; auto: a GPU where there is one.", callback=device_name)
]
Dtype = Annotated[
    str, typer.Option(help="fp32, bf16 or fp16; auto: bf16 on a GPU, fp32 on a CPU.", callback=dtype_name)
]
StoredDtype = Annotated[
    str | None, typer.Option("--dtype", help="fp32, bf16 or fp16.", show_default="as stored", callback=dtype_name)
]
