"""`weft export`: weights for everyone else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import typer

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    source: Path = typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face directory."),
    target: Path = typer.Argument(help="Folder to make; it must not exist."),
    to: str = typer.Option("huggingface", help="What to write: huggingface."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16.", show_default="as stored"),
    shard_size: str = typer.Option("5GB", help="Largest file, as 500MB or 2GiB."),
    verify: bool = typer.Option(
        True, "--verify/--no-verify", help="Load what was written again and compare every bit."
    ),
) -> None:
    """Write a model's weights, config and tokenizer for other programs, and prove the copy before it gets its name."""
    if to != "huggingface":
        raise ValueError(f"--to {to}: weft writes huggingface")
    shard_bytes = parse_size(shard_size)

    import torch

    dtypes = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: choose fp32, bf16 or fp16, or leave it out to keep what is stored")

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from weft.export.huggingface import export_huggingface
    from weft.export.source import check_source
    from weft.serve.folder import find_model

    folder, damage = find_model(source)
    for finding in damage:
        print(f"weft: warning: passed over a damaged checkpoint: {finding}", file=sys.stderr)
    if verify:
        check_source(folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        result = export_huggingface(folder, target, dtypes[dtype], shard_bytes, verify=verify, progress=show)
    kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in result.dtypes))
    plural = "s" if result.num_files > 1 else ""
    print(f"{result.path}: {result.num_params:,} parameters, {kinds}, {result.num_bytes:,} bytes in", end=" ")
    print(f"{result.num_files} file{plural}; tokenizer: {', '.join(result.tokenizer) or 'none beside the weights'}")
    how = "bit for bit" if dtype is None else f"bit for bit what the source rounds to in {dtype}"
    print(f"proved: read back by the safetensors library, {how}" if result.proved else "not proved (--no-verify)")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `1.5GiB` or `1000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: write 500MB, 5GB or 2GiB")
    return size
