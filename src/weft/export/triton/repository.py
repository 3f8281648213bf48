"""Write a model into a repository of Triton's: config, code or settings, weights, and a page that says how to start it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from weft.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from weft.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from weft.checkpoint.adapter import load_adapter
from weft.checkpoint.sidecars import read_json
from weft.checkpoint.weights import WeightsFolder
from weft.export.huggingface import Progress, export_huggingface
from weft.export.triton.backends import ADAPTING, BACKENDS, GRAPHS, PLAIN, Wanted
from weft.export.triton.pbtxt import pbtxt
from weft.export.triton.readme import readme
from weft.folder import make_folder
from weft.models.huggingface import shape_from_config
from weft.serve.cut.share import check_cut
from weft.serve.triton.repository import CONFIG
from weft.serve.triton.settings import ADAPTERS, WEIGHTS, read_settings

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def export_triton(
    source: Path,
    repository: Path,
    name: str,
    backend: str = "weft",
    *,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    link: bool = False,
    adapters: Mapping[str, Path] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Make the folder `name` in a repository, which may hold other models, from a Hugging Face directory.

    It is written beside its name and renamed; the copy of the weights is proved bit for bit, as any export.

    Args:
        backend: weft, vllm, tensorrtllm, onnxruntime or aoti.
        tp: GPUs, or processes, that the model is cut over.
        dtype: of the weights; None: as they are stored.
        link: point at the weights where they are, instead of copying them; at adapters too.
        adapters: LoRA adapters by the name that requests ask for.

    Raises:
        ValueError: the folder is there already, a name or the backend cannot be, or not with this model, the heads
            cannot be dealt out over `tp`, `link` with `dtype`, an adapter is not this model's or the backend takes none,
            or what was written is not what its source is; or the repository cannot be made.
    """
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend}: choose {', '.join(BACKENDS)}")
    if not re.fullmatch(NAME, name):
        raise ValueError(f"--name {name!r} cannot be a model's name in Triton: letters, digits, _, . and - can")
    adapters = adapters or {}
    if bad := [one for one in adapters if not re.fullmatch(NAME, one)]:
        raise ValueError(f"--adapter {bad[0]!r} cannot be an adapter's name: letters, digits, _, . and - can")
    if adapters and backend not in ADAPTING:
        raise ValueError(f"--adapter is for {' and '.join(ADAPTING)}: leave it out with --backend {backend}")
    if backend in GRAPHS and (tp > 1 or link):
        raise ValueError(f"--backend {backend} has the weights in its graph, whole: leave --tp and --link out")
    if link and dtype is not None:
        raise ValueError("--link leaves the weights as they are: leave --dtype out, or copy them")
    repository = Path(repository).resolve()
    if backend in PLAIN and not str(repository).isascii():
        raise ValueError(
            f"{repository}: the Python in Triton that runs {backend} opens only paths in ASCII: choose another --out"
        )
    folder, unfinished = repository / name, repository / f"{name}.tmp"
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another --name, or another repository")
    if unfinished.exists():
        raise ValueError(f"{unfinished} exists, perhaps of an export that was killed: remove it")
    shape = shape_from_config(read_json(source / "config.json"))
    if backend in GRAPHS and shape.experts is not None:
        raise ValueError(f"--backend {backend} runs a graph, where a token cannot choose its experts: use weft or vllm")
    check_cut(shape, tp)
    pairs = {one: load_adapter(where, shape) for one, where in adapters.items()}
    ranks = {one: max((len(a) for a, _ in found.values()), default=1) for one, found in pairs.items()}
    linked = [where.resolve() for where in (source, *adapters.values())] if link else []
    wanted = Wanted(name, folder, shape, tp, main_dtype(source, dtype), ranks, linked)
    written = BACKENDS[backend](wanted)
    version = unfinished / "1"
    make_folder(repository)
    try:
        version.mkdir(parents=True)
        if backend in GRAPHS:
            from weft.export.triton.graph import write_graph

            write_graph(source, version, backend, dtype)
        elif link:
            (version / WEIGHTS).symlink_to(source.resolve(), target_is_directory=True)
        else:
            export_huggingface(source, version / WEIGHTS, dtype, progress=progress)
        for one, where in adapters.items():
            put_adapter(where, version / ADAPTERS / one, link)
        for file, text in written.files.items():
            (version / file).write_text(text, encoding="utf-8")
        if backend == "weft":
            read_settings(version)
        (unfinished / CONFIG).write_text(pbtxt(written.config), encoding="utf-8")
        (unfinished / "README.md").write_text(readme(wanted, backend), encoding="utf-8")
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def main_dtype(source: Path, dtype: torch.dtype | None) -> str:
    """What the weights will be in, or where that is None, what their embedding is stored in."""
    if dtype is None:
        with WeightsFolder.open(source) as weights:
            dtype = weights.dtype("embed.weight")
    return str(dtype).removeprefix("torch.")


def put_adapter(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(exist_ok=True)
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
        return
    target.mkdir()
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source / file, target / file)
