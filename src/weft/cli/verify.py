"""`weft verify`: proofs, whose exit code tells."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.train import Data, Model, Set, Settings

app = typer.Typer(
    help="Prove a run right: a layout, a resume, a checkpoint, an export. Exit code 0: proved; 1: not.",
    no_args_is_help=True,
)

SMALL = {
    "family": "llama", "num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 128, "vocab": 256,
    "max_seq": 64, "init_std": 0.1,
}  # fmt: skip
"""What is compared where no model is named: small, and with every gradient well above rounding."""


@app.command(epilog="Example: weft verify layout single fsdp2.tp2.sp --model gpt2-124m --seq 64 --batch 8")
def layout(
    a: Annotated[str, typer.Argument(help="A layout to compare with: mostly `single`, one process.")],
    b: Annotated[str, typer.Argument(help="The layout to prove: fsdp2.tp2.sp, …")],
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    batch: Annotated[int | None, typer.Option(help="train.global_batch")] = None,
    seq: Annotated[int | None, typer.Option(help="train.seq")] = None,
    steps: Annotated[int, typer.Option(help="Steps to compare.", min=1)] = 3,
    overrides: Set = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the traces in this folder.")] = None,
) -> None:
    """Train a few steps under two layouts, from the same weights and data, and compare all they compute.

    Loss, what every module gives, every gradient, every updated weight. Without settings: a small model, random tokens.
    """
    from rich.console import Console

    from weft.config.layout import Layout
    from weft.config.load import load_config
    from weft.verify.layout import verify_layouts
    from weft.verify.report import show_layouts

    base: list[str | tuple[str, object]] = [] if settings or model else [("model", SMALL)]
    short = {"model.preset": model, "data.paths": data or None, "train.global_batch": batch, "train.seq": seq}
    given = [(key, value) for key, value in short.items() if value is not None]
    config = load_config(settings or [], [*base, *given, *(overrides or []), ("layout", "single")])
    with tempfile.TemporaryDirectory(prefix="weft-verify-") as folder:
        report = verify_layouts(config, Layout.parse(a), Layout.parse(b), steps, keep or Path(folder))
    show_layouts(report, Console())
    raise typer.Exit(0 if report.right else 1)
