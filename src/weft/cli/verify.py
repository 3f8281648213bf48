"""`weft verify`: proofs, whose exit code tells."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.bar import progress_bar
from weft.cli.options import Data, Device, Dtype, LayoutText, Model, Set, Settings
from weft.cli.output import vacant

if TYPE_CHECKING:
    from weft.config.tree import Config

app = typer.Typer(
    help="Prove a run right: a layout, a resume, a checkpoint, an export, a server. Exit code 0: proved; 1: not.",
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
    keep: Annotated[Path | None, typer.Option(help="Keep the traces in this folder.", callback=vacant)] = None,
) -> None:
    """Train a few steps under two layouts, from the same weights and data, and compare all they compute.

    Loss, what every module gives, every gradient, every updated weight. Without settings: a small model, random tokens.
    """
    from rich.console import Console

    from weft.config.layout import Layout

    config = settled(settings, model, data, batch, seq, [*(overrides or []), ("layout", "single")])
    one, other = Layout.parse(a), Layout.parse(b)

    from weft.verify.layout import RunFailedError, verify_layouts  # torch, which takes a while
    from weft.verify.report import show_layouts

    with tempfile.TemporaryDirectory(prefix="weft-verify-") as folder, progress_bar() as progress:
        try:
            report = verify_layouts(config, one, other, steps, keep or Path(folder), progress)
        except RunFailedError as error:
            print(f"weft: error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    show_layouts(report, Console())
    raise typer.Exit(0 if report.right else 1)


@app.command(epilog="Example: weft verify resume --layout fsdp2 --resume-layout tp2 --steps 5")
def resume(
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    layout: LayoutText = None,
    resume_layout: Annotated[str | None, typer.Option(help="Resume under another layout.")] = None,
    batch: Annotated[int | None, typer.Option(help="train.global_batch")] = None,
    seq: Annotated[int | None, typer.Option(help="train.seq")] = None,
    # a replica that lost its own moments shows in the second step after, which all of them compute together
    steps: Annotated[int, typer.Option(help="Steps before the checkpoint, and after it.", min=2)] = 5,
    overrides: Set = None,
    keep: Annotated[Path | None, typer.Option(help="Keep both runs in this folder.", callback=vacant)] = None,
) -> None:
    """Train without a break, and again: killed by SIGKILL after a checkpoint, and resumed. Compare every bit.

    Every weight, both moments, the position in the data, and the loss of every step; within the bounds of parity where
    the layouts differ. Without settings: a small model; without data: random tokens.
    """
    from rich.console import Console

    from weft.config.layout import Layout

    config = settled(settings, model, data, batch, seq, [*(overrides or []), *([("layout", layout)] if layout else [])])
    other = Layout.parse(resume_layout) if resume_layout else None

    from weft.verify.report import show_resume
    from weft.verify.resume import verify_resume

    with tempfile.TemporaryDirectory(prefix="weft-verify-") as folder, progress_bar() as progress:
        try:
            report = verify_resume(config, steps, keep or Path(folder), other, progress)
        except RuntimeError as error:
            print(f"weft: error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    show_resume(report, Console())
    raise typer.Exit(0 if report.right else 1)


@app.command(epilog="Example: weft verify checkpoint runs/run")
def checkpoint(path: Annotated[Path, typer.Argument(help="A checkpoint (step-…), or a run: all of its.")]) -> None:
    """Compare every byte of a checkpoint with what was written."""
    from rich.console import Console

    from weft.checkpoint.folder import checkpoints
    from weft.verify.checkpoint import verify_checkpoint
    from weft.verify.report import show_checkpoints

    paths = checkpoints(path / "checkpoints") or checkpoints(path)
    if not paths and (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is a run without a checkpoint")
    reports = [verify_checkpoint(one) for one in paths or [path]]
    show_checkpoints(reports, Console())
    raise typer.Exit(0 if all(report.whole for report in reports) else 1)


@app.command(epilog="Example: weft verify export runs/run")
def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face folder.")],
) -> None:
    """Compute the weights by weft and by transformers' own model, on the same tokens, and compare."""
    from rich.console import Console

    from weft.serve.folder import find_model

    find_model(path)

    from weft.verify.export import verify_export
    from weft.verify.report import show_export

    report = verify_export(path)
    show_export(report, Console())
    raise typer.Exit(0 if report.right else 1)


@app.command(epilog="Example: weft verify serve runs/run --dtype bf16")
def serve(
    path: Annotated[Path, typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face folder.")],
    dtype: Dtype = "auto",
    device: Device = "auto",
    tp: Annotated[int, typer.Option(help="Processes that the server cuts every matrix over.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Stages that it deals the blocks out to.", min=1)] = 1,
    cache_dtype: Annotated[str, typer.Option(help="Of keys and values: int8, or auto, as the model's.")] = "auto",
) -> None:
    """Compare the log-probabilities that the server tells with those that the trainer computes, and certify it.

    The certificate, parity.json, is laid beside the weights: one entry for each dtype, device, tp, pp and kind of cache.
    """
    from rich.console import Console

    from weft.serve.config import EngineConfig
    from weft.serve.folder import find_model

    config = EngineConfig(dtype=dtype, device=device, tp=tp, pp=pp, cache_dtype=cache_dtype)
    find_model(path)

    from weft.verify.report import show_serve
    from weft.verify.serve import verify_serve, write_certificate

    with progress_bar() as progress:
        report = verify_serve(path, config, progress)
    show_serve(report, write_certificate(report), Console())
    raise typer.Exit(0 if report.right else 1)


def settled(
    settings: list[Path] | None, model: str | None, data: list[str] | None, batch: int | None, seq: int | None,
    overrides: list[str | tuple[str, object]],
) -> Config:  # fmt: skip
    """The settings of the options that all proofs share; a small model where none is named."""
    from weft.config.load import load_config

    base: list[str | tuple[str, object]] = [] if settings or model else [("model", SMALL)]
    short = {"model.preset": model, "data.paths": data or None, "train.global_batch": batch, "train.seq": seq}
    given = [(key, value) for key, value in short.items() if value is not None]
    return load_config(settings or [], [*base, *given, *overrides])
