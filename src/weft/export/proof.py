"""Prove a written Hugging Face directory: load it with the safetensors library, compare it with its source."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from weft.checkpoint.region import Region
from weft.checkpoint.shards import INDEX, SINGLE
from weft.checkpoint.sidecars import listed, read_json
from weft.checkpoint.weights import CONFIG, WeightsFolder, stored_dtype
from weft.models.huggingface import Place, shape_from_config

CHUNK = 16 << 20
"""Bytes of a parameter, in fp32, that are in memory at a time."""


def prove(
    source: WeightsFolder,
    target: Path,
    dtype: torch.dtype | None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """The target describes the same model, and holds each number of the source: the same bits, or, in another dtype,
    the bits that it rounds to. weft's own reader sees only the source; the target is read by the library.

    Raises:
        ValueError: it does not; names what differs first.
    """
    if shape_from_config(read_json(target / CONFIG)) != source.shape:
        raise ValueError(f"the export is wrong: its {CONFIG} describes another model than that of {source.path}")
    files = _files(target)
    wanted = {place.tensor for place in source.places.values()}
    if files.keys() != wanted:
        raise ValueError(f"the export is wrong: it differs from its source in {listed(sorted(files.keys() ^ wanted))}")
    parts = defaultdict(list)
    for name, place in source.places.items():
        parts[place.tensor].append(name)
    done = 0
    for tensor, file in files.items():
        # a file opened anew for each tensor: the pages of a map stay in memory until it is closed
        with safe_open(file, framework="pt") as opened:
            stored = opened.get_slice(tensor)
            for name in parts[tensor]:
                place = source.places[name]
                for region in row_regions(name, place):
                    box = tuple(slice(a, b) for a, b in zip(*place.box(region.start, region.stop), strict=True))
                    found = stored[box]
                    wants = source.read(region, None if dtype is None else stored_dtype(tensor, dtype))
                    if not same_bits(found.T if place.transposed else found, wants):
                        raise ValueError(
                            f"the export is wrong: {tensor} in {file.name} differs from {name} of {source.path} "
                            f"between {region.start} and {region.stop}; it was removed; failing again, test the disk"
                        )
                    done += prod(region.dims)
                    progress("proving", done, source.shape.num_params)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Same dtype, dims and bits: NaN equals itself, and 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(raw), other.contiguous().view(raw))


def row_regions(name: str, place: Place) -> Iterator[Region]:
    """A parameter, cut into regions that fit into CHUNK, each of whole rows of the stored tensor."""
    whole, dim = Region.whole(name, place.weft_sizes), 1 if place.transposed else 0
    size = whole.sizes[dim]
    rows = max(1, CHUNK * size // (4 * prod(whole.sizes)))
    for start in range(0, size, rows):
        yield whole.narrow(dim, start, min(start + rows, size))


def _files(folder: Path) -> dict[str, Path]:
    """Tensor → its file, as every other reader finds it."""
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {tensor: folder / file for tensor, file in weight_map.items()}
    with safe_open(folder / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)
