"""Which tensor goes into which file: `model-00001-of-00003.safetensors` and its index. Torch only for dtypes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.checkpoint.tensors import Entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """File name → its tensors, in the order given; a file holds at most `max_bytes`, or one tensor larger than that."""
    if max_bytes < 1:
        raise ValueError(f"a shard of {max_bytes} bytes holds nothing; the size must be at least 1")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def shard_index(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """What `model.safetensors.index.json` says of several shards."""
    total = sum(entry.num_bytes for shard in shards.values() for entry in shard)
    weight_map = {entry.name: file for file, shard in shards.items() for entry in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def tensor_files(folder: Path) -> dict[str, set[str] | None]:
    """The files that hold a folder's weights → the tensors that the index puts there (None where there is no index).

    Raises:
        ValueError: none, or two answers; or an index that is malformed.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}: take away the one that is not meant")
    if single.is_file():
        return {SINGLE: None}
    if not index.is_file():
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        hint = f" ({pickled[0]} is a pickle, which weft never opens: save it as safetensors)" if pickled else ""
        raise ValueError(f"{folder} holds no weights: there is no {SINGLE} and no {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}") from error
    files: dict[str, set[str] | None] = {}
    for tensor, file in items:
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain:
            raise ValueError(f"{index}: {tensor} is said to be in {file!r}, which is not a safetensors file beside it")
        if not (folder / file).is_file():
            raise ValueError(f"{index} puts {tensor} in {file}, which is not there")
        named = files.setdefault(file, set())
        assert named is not None
        named.add(tensor)
    if not files:
        raise ValueError(f"{index} names no tensor")
    return files
