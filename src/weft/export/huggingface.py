"""Write a model's weights as a Hugging Face directory, streaming, and prove the copy before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from weft.checkpoint.region import Region
from weft.checkpoint.sidecars import copy_tokenizer, read_json
from weft.checkpoint.weights import GENERATION_CONFIG, SHARD_BYTES, WeightsFolder, create_weights_folder
from weft.export.proof import prove, row_regions
from weft.folder import make_folder
from weft.models.huggingface import TOKEN_KEYS

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many numbers of how many."""


@dataclass(frozen=True)
class Exported:
    """What lies in the folder now."""

    path: Path
    num_params: int
    num_bytes: int
    num_files: int
    dtypes: frozenset[torch.dtype]
    tokenizer: tuple[str, ...]
    proved: bool


def export_huggingface(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    verify: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Exported:
    """Copy the weights, config and tokenizer of the Hugging Face directory `source` to a new one.

    It is written beside `target` as `….tmp`, synced, proved, and renamed. Whatever goes wrong, nothing is left.

    Args:
        dtype: of every tensor; None: as each is stored.
        verify: load what was written again, by another reader, and compare it with the source bit for bit.

    Raises:
        ValueError: the source is not a whole model, the target is there already, a number does not fit into `dtype`,
            the disk is too small, or the proof failed.
    """
    source, target = Path(source), Path(target)
    unfinished = target.with_name(f"{target.name}.tmp")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: name a new folder")
    if unfinished.exists():
        raise ValueError(f"{unfinished} exists, perhaps of an export that was killed: remove it")
    with WeightsFolder.open(source) as folder:
        folder.check()
        try:
            tokenizer = _write(folder, unfinished, dtype, shard_bytes, progress)
            if verify:
                prove(folder, unfinished, dtype, progress)
            os.rename(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        files = sorted(target.glob("*.safetensors"))
        return Exported(
            path=target,
            num_params=folder.shape.num_params,
            num_bytes=sum(file.stat().st_size for file in files),
            num_files=len(files),
            dtypes=frozenset(folder.dtypes().values()) if dtype is None else frozenset((dtype,)),
            tokenizer=tuple(tokenizer),
            proved=verify,
        )


def _write(
    folder: WeightsFolder, path: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Progress
) -> list[str]:
    """Everything but the new folder's name; which tokenizer files there are."""
    generation = folder.path / GENERATION_CONFIG
    width = max(kind.itemsize for kind in folder.dtypes().values()) if dtype is None else dtype.itemsize
    make_folder(path.parent)
    free, needed = shutil.disk_usage(path.parent).free, folder.shape.num_params * width
    if free < needed:
        raise ValueError(f"{path.parent} has {free:,} bytes of room, and the weights need up to {needed:,}")
    with create_weights_folder(
        path,
        folder.shape,
        folder.dtypes() if dtype is None else dtype,
        shard_bytes,
        tokens={key: folder.config.get(key) for key in TOKEN_KEYS},
        generation=read_json(generation) if generation.is_file() else None,
    ) as new:
        done = 0
        for name, place in folder.places.items():
            for region in row_regions(name, place):
                new.write(region, converted(region, folder.read(region), new.dtype(name)))
                done += prod(region.dims)
                progress("writing", done, folder.shape.num_params)
        new.sync()
    return copy_tokenizer(folder.path, path)


def converted(region: Region, numbers: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The numbers in `dtype`. Raises ValueError where a finite one would become infinite."""
    if dtype is None or numbers.dtype == dtype:
        return numbers
    rounded = numbers.to(dtype)
    if bool((rounded.isinf() & ~numbers.isinf()).any()):
        largest = numbers.abs().nan_to_num(posinf=0.0).max().item()
        raise ValueError(
            f"{region.name} holds {largest:.4g}, too large for {str(dtype).removeprefix('torch.')}: "
            "export as bf16, or fp32"
        )
    return rounded
