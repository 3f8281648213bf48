"""The weights of a model as a Hugging Face directory, read and written by regions of weft's own parameters.

The same folder serves training (every process writes the regions it holds, in place), export, and the server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from weft.checkpoint.region import Region
from weft.checkpoint.shards import INDEX, plan_shards, shard_index, tensor_files
from weft.checkpoint.sidecars import copy_tokenizer, listed, read_json, write_json
from weft.checkpoint.stacked import stacked_parts
from weft.checkpoint.tensors import Entry, TensorFile, create
from weft.models.decoder import Decoder
from weft.models.huggingface import TOKEN_KEYS, Place, config_from_shape, places, shape_from_config
from weft.models.parameters import buffer_sizes, is_stacked
from weft.models.places import SELECTION_BIAS
from weft.models.shape import Shape

__all__ = ["SHARD_BYTES", "WeightsFolder", "Written", "copy_tokenizer", "create_weights_folder", "load_decoder"]

SHARD_BYTES = 5_000_000_000
"""What Hugging Face itself cuts at."""

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_BUFFERS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # GPT-2's causal mask
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
"""Tensors that older files hold though they follow from the config."""


@dataclass(frozen=True)
class Written:
    """A box of one tensor of one file, and the sha256 of its bytes there in row order."""

    file: str
    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    sha256: str


class WeightsFolder:
    """An open directory of weights. A context manager: it holds its files open.

    Attributes:
        config: config.json as it lies there.
        shape: what it describes.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: dict[str, TensorFile]) -> None:
        self.path, self.config, self.files = path, config, files
        self.shape = shape_from_config(config)
        self.places: dict[str, Place] = places(self.shape)
        # the name in places() → the file, and the name in there
        self._found: dict[str, tuple[TensorFile, str]] = {}
        for file in files.values():
            for name in file.entries:
                canonical = self._canonical(name)
                if canonical in self._found:
                    other = self._found[canonical][1]
                    raise ValueError(f"{path} holds one tensor twice: as {other} and as {name}")
                self._found[canonical] = (file, name)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> WeightsFolder:
        """Open a directory: config.json with model.safetensors, or with an index and its shards.

        Raises:
            ValueError: a file is missing or malformed, or the config asks for what weft does not compute.
        """
        path = Path(path)
        config = read_json(path / CONFIG)
        files: dict[str, TensorFile] = {}
        try:
            for name, indexed in tensor_files(path).items():
                files[name] = TensorFile(path / name, writable=writable)
                if indexed is not None and (differ := indexed ^ files[name].entries.keys()):
                    raise ValueError(f"{path / INDEX} and {name} disagree on {listed(sorted(differ))}")
            return cls(path, config, files)
        except BaseException:
            for file in files.values():
                file.close()
            raise

    def read(self, region: Region, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of a region of a weft parameter, on the CPU; as stored, or in `dtype`."""
        place, (file, name) = self._locate(region)
        tensor = file.read(name, *place.box(region.start, region.stop))
        tensor = tensor.T if place.transposed else tensor
        return tensor if dtype is None else tensor.to(dtype)

    def write(self, region: Region, tensor: Tensor) -> Written:
        """Store a region of a weft parameter, converted to the dtype of the file. Disjoint regions may be written at
        once by several processes; what lies where is the same whoever writes it."""
        place, (file, name) = self._locate(region)
        assert tuple(tensor.shape) == region.dims, (region, tuple(tensor.shape))
        tensor = tensor.detach().to(file.entry(name).dtype)
        start, stop = place.box(region.start, region.stop)
        sha256 = file.write(name, tensor.T if place.transposed else tensor, start, stop)
        return Written(file.path.name, name, start, stop, sha256)

    def dtype(self, name: str) -> torch.dtype:
        """In which a weft parameter is stored."""
        return self._entry(self.places[name].tensor).dtype

    def dtypes(self) -> dict[str, torch.dtype]:
        """The same of every tensor, by its name there."""
        return {place.tensor: self._entry(place.tensor).dtype for place in self.places.values()}

    def check(self) -> None:
        """Every tensor that the shape asks for is there in its size, and no other.

        Raises:
            ValueError: names what is missing, unexpected, wrongly shaped or of a type that is no weight.
        """
        wanted = {place.tensor: place.sizes for place in self.places.values()}
        extra = {name for name in self._found.keys() - wanted.keys() if not self._is_passed_over(name)}
        if self.shape.tied and "lm_head.weight" in extra:
            extra.remove("lm_head.weight")
            self._check_tied_head()
        found = {name: self._entry(name) for name in wanted.keys() & self._found.keys()}
        shaped = [
            f"{name} ({list(found[name].sizes)}, should be {list(sizes)})"
            for name, sizes in wanted.items()
            if name in found and found[name].sizes != sizes
        ]
        typed = [f"{name} ({entry.dtype})" for name, entry in found.items() if entry.dtype not in _FLOATS]
        problems = {
            "missing": [name for name in wanted if name not in found],
            "unexpected": sorted(self._found[name][1] for name in extra),
            "wrongly shaped": shaped,
            "not of a floating-point type": typed,
        }
        said = [f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
        if said:
            raise ValueError(f"the weights in {self.path} are not those of its {CONFIG}: {'; '.join(said)}")

    def sync(self) -> None:
        """Return when what this process wrote is on the disk."""
        for file in self.files.values():
            file.sync()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _canonical(self, name: str) -> str:
        """GPT-2's tensors come with and without the prefix."""
        bare = self.shape.family == "gpt2" and not name.startswith(("transformer.", "lm_head."))
        return f"transformer.{name}" if bare else name

    def _is_passed_over(self, name: str) -> bool:
        """What follows from the config, and DeepSeek-V3's layers after the last: they predict tokens further ahead."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        ahead = layer is not None and int(layer[1]) >= self.shape.num_layers
        return bool(_BUFFERS.fullmatch(name)) or (ahead and self.shape.family == "deepseek_v3")

    def _entry(self, canonical: str) -> Entry:
        if canonical not in self._found:
            raise ValueError(f"{self.path} lacks the tensor {canonical}")
        file, name = self._found[canonical]
        return file.entry(name)

    def _locate(self, region: Region) -> tuple[Place, tuple[TensorFile, str]]:
        place = self.places[region.name]
        assert region.sizes == (place.weft_sizes), (region, place)
        if (entry := self._entry(place.tensor)).sizes != place.sizes:
            raise ValueError(
                f"{self.path}: {entry.name} is {list(entry.sizes)}; by {CONFIG} it must be {list(place.sizes)}"
            )
        return place, self._found[place.tensor]

    def _check_tied_head(self) -> None:
        embedding = self.places["embed.weight"].tensor
        if embedding not in self._found:
            return  # reported as missing
        kinds, digests = set(), set()
        for canonical in (embedding, "lm_head.weight"):
            file, name = self._found[canonical]
            kinds.add((file.entry(name).sizes, file.entry(name).dtype))
            digests.add(file.digest(name))
        if len(kinds) > 1 or len(digests) > 1:
            raise ValueError(
                f"{self.path}: {CONFIG} ties the head to the embedding, but lm_head.weight differs from {embedding}; "
                "if it was trained apart, set tie_word_embeddings to false"
            )


def create_weights_folder(
    path: Path,
    shape: Shape,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    shard_bytes: int = SHARD_BYTES,
    tokens: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> WeightsFolder:
    """Lay down config.json and files of the right size, full of zeros, and open them for writing.

    One process does this; then others may `WeightsFolder.open(path, writable=True)` and write too.

    Args:
        dtype: of all tensors but routers' biases, or of each by its Hugging Face name.
        tokens: the ids in TOKEN_KEYS, where known.
        generation: generation_config.json; without it, one of `tokens` where the end of text is known.

    Raises:
        ValueError: the folder holds weights already, or Hugging Face has no such model.
    """
    path = Path(path)
    entries: dict[str, Entry] = {}
    for place in places(shape).values():
        kind = stored_dtype(place.tensor, dtype) if isinstance(dtype, torch.dtype) else dtype[place.tensor]
        entries[place.tensor] = Entry(place.tensor, place.sizes, kind)
    main = next(iter(entries.values())).dtype
    ids = {key: value for key, value in (tokens or {}).items() if key in TOKEN_KEYS and value is not None}
    config = config_from_shape(shape, str(main).removeprefix("torch."), ids)
    path.mkdir(parents=True, exist_ok=True)
    if (path / CONFIG).exists():
        raise ValueError(f"{path} holds a model already; name a new folder")
    shards = plan_shards(list(entries.values()), shard_bytes)
    for name, shard in shards.items():
        create(path / name, shard)
    if len(shards) > 1:
        write_json(path / INDEX, shard_index(shards))
    if generation is not None or "eos_token_id" in ids:
        write_json(path / GENERATION_CONFIG, ids if generation is None else generation)
    write_json(path / CONFIG, config)
    return WeightsFolder.open(path, writable=True)


def stored_dtype(tensor: str, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor in a folder of this dtype. A router's bias is fp32 always: so it is published, and worked with."""
    return torch.float32 if tensor.endswith(SELECTION_BIAS) else dtype


def load_decoder(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Shape, Decoder]:
    """The whole model on one device, in `dtype` or as stored.

    Raises:
        ValueError: as WeightsFolder.open and .check.
    """
    with WeightsFolder.open(path) as folder:
        folder.check()
        with torch.device("meta"):
            model = Decoder(folder.shape)
        for name, parameter in list(model.named_parameters()):
            if is_stacked(name):
                parts = [folder.read(region, dtype) for region, _ in stacked_parts(folder.shape, name)]
            else:
                parts = [folder.read(Region.whole(name, tuple(parameter.shape)), dtype)]
            owner, _, leaf = name.rpartition(".")
            tensor = (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous().to(device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        for name, sizes in buffer_sizes(folder.shape).items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, folder.read(Region.whole(name, sizes), torch.float32).to(device))
        if folder.shape.tied:
            assert model.head is not None
            assert model.embed is not None
            model.head.weight = model.embed.weight
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never filled: {left}"
    return folder.shape, model
