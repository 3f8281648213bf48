"""`weft export`: weights for everyone else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from weft.cli.bar import progress_bar
from weft.cli.options import StoredDtype

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Forms(TyperGroup):
    """`weft export SOURCE TARGET` is short for `weft export huggingface SOURCE TARGET`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["huggingface", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Forms,
    help="Write a model for other programs: a Hugging Face directory (the default), or a repository for Triton.",
    no_args_is_help=True,
)


@app.command("huggingface")
def export(
    source: Path = typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face directory."),
    target: Path = typer.Argument(help="Folder to make; it must not exist."),
    dtype: StoredDtype = None,
    shard_size: str = typer.Option("5GB", help="Largest file, as 500MB or 2GiB."),
    verify: bool = typer.Option(
        True, "--verify/--no-verify", help="Load what was written again and compare every bit."
    ),
) -> None:
    """Write a model's weights, config and tokenizer for other programs, and prove the copy before it gets its name."""
    shard_bytes = parse_size(shard_size)
    folder = sound_source(source, verify)

    from weft.export.huggingface import export_huggingface

    chosen = choose_dtype(dtype)
    with progress_bar() as show:
        result = export_huggingface(folder, target, chosen, shard_bytes, verify=verify, progress=show)
    kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in result.dtypes))
    plural = "s" if result.num_files > 1 else ""
    print(f"{result.path}: {result.num_params:,} parameters, {kinds}, {result.num_bytes:,} bytes in", end=" ")
    print(f"{result.num_files} file{plural}; tokenizer: {', '.join(result.tokenizer) or 'none beside the weights'}")
    how = "bit for bit" if dtype is None else f"bit for bit what the source rounds to in {dtype}"
    print(f"proved: read back by the safetensors library, {how}" if result.proved else "not proved (--no-verify)")


def choose_dtype(name: str | None) -> torch.dtype | None:
    """None: as it is stored."""
    from weft.models.dtypes import dtype_of

    return None if name is None else dtype_of(name)


def sound_source(source: Path, verify: bool) -> Path:
    """The Hugging Face directory that is meant, held against its checkpoint's manifest."""
    from weft.serve.folder import find_model

    folder, damage = find_model(source)
    for finding in damage:
        print(f"weft: warning: passed over a damaged checkpoint: {finding}", file=sys.stderr)
    if verify:
        from weft.export.source import check_source

        check_source(folder)
    return folder


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `1.5GiB` or `1000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: write 500MB, 5GB or 2GiB")
    return size
