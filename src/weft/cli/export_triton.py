"""`weft export triton`: a model into a repository of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from weft.cli.bar import progress_bar
from weft.cli.export import choose_dtype, sound_source
from weft.cli.options import StoredDtype


def triton(
    source: Path = typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face directory."),
    out: Path = typer.Option(help="The repository: a folder, new or with other models in it."),
    backend: str = typer.Option(
        "weft",
        help="Who computes: weft, vllm or tensorrtllm, which make texts; onnxruntime or aoti, which make logits.",
    ),
    name: str | None = typer.Option(None, help="The model's name in Triton.", show_default="that of the run or folder"),
    tp: int = typer.Option(1, help="GPUs, or on a CPU processes, that the model is cut over."),
    dtype: StoredDtype = None,
    adapter: list[str] = typer.Option(
        [],
        metavar="[NAME=]DIR",
        help="A LoRA adapter, as peft wrote it, that requests name as lora_name (weft, vllm); repeatable.",
    ),
    link: bool = typer.Option(
        False, "--link/--copy", help="Point at the weights where they are, or copy them and prove the copy."
    ),
) -> None:
    """Write a model, with its config and a page on how to start it, into a model repository for Triton.

    Then: weft serve-triton OUT
    """
    from weft.cli.serve import split_adapters

    adapters = {name: Path(folder) for name, folder in split_adapters(adapter).items()}
    folder = sound_source(source, verify=True)

    from weft.export.triton.backends import GRAPHS
    from weft.export.triton.repository import export_triton

    chosen = choose_dtype(dtype)
    name = name or model_name(source)
    with progress_bar() as show:
        made = export_triton(
            folder, out, name, backend, tp=tp, dtype=chosen, link=link, adapters=adapters, progress=show
        )
    print(f"{made}: model {name!r} for Triton, backend {backend}", end="; ")
    if backend in GRAPHS:
        print("proved: loaded again, the logits are the model's")
    else:
        print("weights linked" if link else "weights copied, and proved bit for bit")
    print(f"{made / 'README.md'} says how to start it", end="")
    print(f"; here: weft serve-triton {out}" if backend in ("weft", *GRAPHS) else "")


def model_name(source: Path) -> str:
    """What a run, a checkpoint of it, or a folder of weights is called, in characters that Triton takes."""
    parts = [part for part in source.resolve().parts if part != "model" and not part.startswith("step-")]
    parts = parts[:-1] if parts[-1] == "checkpoints" else parts
    return re.sub(r"[^A-Za-z0-9_.-]", "-", parts[-1]).lstrip("-.") or "model"
