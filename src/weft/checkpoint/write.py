"""Writing one checkpoint: every process puts its own regions in place, rank 0 lays out, seals and publishes.

Nothing is gathered. The processes meet at five agreements, and what one has to tell another it says in small files.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.agreement import Agreement, ElsewhereError, LostError
from weft.checkpoint.folder import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    free_bytes,
    publish,
    step_path,
    sync,
    unfinished_path,
    write_file,
)
from weft.checkpoint.inspection import read_header
from weft.checkpoint.manifest import FileRecord, Manifest, RegionRecord, check_cover
from weft.checkpoint.region import Piece
from weft.checkpoint.shards import plan_shards
from weft.checkpoint.tensors import DTYPE_NAMES, DTYPES, Entry, TensorFile, create
from weft.checkpoint.weights import SHARD_BYTES, WeightsFolder, copy_tokenizer, create_weights_folder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape

_SLACK = 1 << 20
"""Bytes asked for besides the tensors: manifest, folders."""


class CheckpointError(ValueError):
    """Saving went wrong, in one of the ways below; training may go on.

    Attributes:
        step: of the checkpoint.
        rank: the process that failed; every process raises.
    """

    happened = ""

    def __init__(self, step: int, rank: int, cause: str) -> None:
        super().__init__(f"the checkpoint of step {step} {self.happened}: rank {rank}: {cause}")
        self.step, self.rank = step, rank


class SaveError(CheckpointError):
    """A checkpoint could not be written. Nothing of it is left, and the older ones are as they were."""

    happened = "was not saved"


class DiskFullError(SaveError):
    """There is no room for a checkpoint."""


class RemovalError(CheckpointError):
    """The checkpoint is saved and whole; older ones could not be removed."""

    happened = "is saved, but older ones could not be removed"


@dataclass(frozen=True)
class Plan:
    """What stays the same from one checkpoint of a run to the next.

    Attributes:
        folder: `<run>/checkpoints`.
        tokenizer: tokenizer.json, or the folder that holds it; its files go beside the weights.
        tokens: ids of the tokenizer that belong into config.json (weft.models.huggingface.TOKEN_KEYS).
        shard_bytes: largest tensor file.
    """

    folder: Path
    shape: Shape
    tokenizer: Path | None = None
    tokens: Mapping[str, Any] | None = None
    shard_bytes: int = SHARD_BYTES


def write_checkpoint(
    plan: Plan,
    agreement: Agreement,
    step: int,
    model: Sequence[Piece],
    optimizer: Sequence[Piece],
    state: Mapping[str, Any],
) -> Path:
    """Write and publish the checkpoint of a step; every process of the agreement calls this with its own pieces.

    Args:
        state: of rank 0 is stored; has `layout`.

    Raises:
        DiskFullError, SaveError: on every process, if any one of them failed.
    """
    unfinished, main = unfinished_path(plan.folder, step), agreement.rank == 0
    try:
        with agreement.together(), _named(step, agreement.rank):
            if main:
                _start(unfinished)
        with agreement.together(), _named(step, agreement.rank):
            _tell(unfinished, agreement.rank, "tensors", _entries(plan.shape, model, optimizer))
        with agreement.together(), _named(step, agreement.rank):
            if main:
                _lay_out(plan, unfinished, _told(unfinished, agreement.world, "tensors"), step)
        with agreement.together(), _named(step, agreement.rank):
            _tell(unfinished, agreement.rank, "regions", _write_pieces(unfinished, model, optimizer, everything=main))
        with agreement.together(), _named(step, agreement.rank):
            if main:
                _seal(unfinished, step, _told(unfinished, agreement.world, "regions"), state)
                publish(unfinished, step_path(plan.folder, step))
    except ElsewhereError as error:
        kind = DiskFullError if error.kind == DiskFullError.__name__ else SaveError
        raise kind(step, error.rank, error.words.removeprefix(str(SaveError(step, error.rank, "")))) from error
    except LostError as error:
        raise SaveError(step, agreement.rank, str(error)) from error
    finally:
        # after an agreement nobody writes any more; where a process was lost, the next start sweeps
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
    return step_path(plan.folder, step)


def _start(unfinished: Path) -> None:
    if unfinished.exists():
        shutil.rmtree(unfinished)
    for folder in (unfinished / MODEL, unfinished / OPTIMIZER):
        folder.mkdir(parents=True)


def _entries(shape: Shape, model: Sequence[Piece], optimizer: Sequence[Piece]) -> list[list[Any]]:
    """Name, dims and dtype of each tensor of the optimizer that this process has a part of."""
    sizes = stored_sizes(shape)
    for piece in model:
        if sizes.get(piece.region.name) != piece.region.sizes:
            raise ValueError(
                f"{piece.region.name} {list(piece.region.sizes)} is no parameter of the model, "
                f"where that name has {sizes.get(piece.region.name, 'no place')}"
            )
    kinds = {piece.region.name: [list(piece.region.sizes), DTYPE_NAMES[piece.data.dtype]] for piece in optimizer}
    return [[name, *kind] for name, kind in kinds.items()]


def _lay_out(plan: Plan, unfinished: Path, told: list[Any], step: int) -> None:
    """Make every file in its full size; none takes room before it is written."""
    entries: dict[str, Entry] = {}
    for name, dims, dtype in (entry for entries_of_rank in told for entry in entries_of_rank):
        entry = Entry(name, tuple(dims), DTYPES[dtype])
        if entries.setdefault(name, entry) != entry:
            raise ValueError(f"the processes do not agree on {name}: {entry} on one, {entries[name]} on another")
    folder = unfinished / MODEL
    create_weights_folder(folder, plan.shape, torch.float32, plan.shard_bytes, plan.tokens).close()
    if entries:
        for file, shard in plan_shards([entries[name] for name in sorted(entries)], plan.shard_bytes).items():
            create(unfinished / OPTIMIZER / file.replace("model", "optimizer"), shard)
    if plan.tokenizer is not None:
        if plan.tokenizer.is_file() and plan.tokenizer.name != "tokenizer.json":
            (folder / "tokenizer.json").write_bytes(plan.tokenizer.read_bytes())
        else:
            copy_tokenizer(plan.tokenizer.parent if plan.tokenizer.is_file() else plan.tokenizer, folder)
    needed = sum(file.stat().st_size for file in unfinished.rglob("*")) + _SLACK
    if (free := free_bytes(unfinished)) < needed:
        raise DiskFullError(
            step, 0, f"{plan.folder} has {free:,} bytes of room and {needed:,} are needed. Free some, or lower "
            "checkpoint.keep; the older checkpoints are untouched"
        )  # fmt: skip


def _write_pieces(
    unfinished: Path, model: Sequence[Piece], optimizer: Sequence[Piece], *, everything: bool
) -> dict[str, list[list[Any]]]:
    """Put this process's regions in place, and on the disk → file → tensor, start, stop, sha256 of each.

    Args:
        everything: force all files to the disk, not only those that this process wrote to.
    """
    written: dict[str, list[list[Any]]] = defaultdict(list)
    with ExitStack() as stack:
        weights = stack.enter_context(WeightsFolder.open(unfinished / MODEL, writable=True))
        files = {f"{MODEL}/{name}": file for name, file in weights.files.items()}
        found: dict[str, str] = {}
        for path in sorted((unfinished / OPTIMIZER).glob("*.safetensors")):
            file = stack.enter_context(TensorFile(path, writable=True))
            files[f"{OPTIMIZER}/{path.name}"] = file
            found |= dict.fromkeys(file.entries, f"{OPTIMIZER}/{path.name}")
        for piece in _to_write(model):
            box = weights.write(piece.region, piece.data)
            written[f"{MODEL}/{box.file}"].append([box.tensor, box.start, box.stop, box.sha256])
        for piece in _to_write(optimizer):
            region, name = piece.region, found[piece.region.name]
            digest = files[name].write(region.name, piece.data, region.start, region.stop)
            written[name].append([region.name, region.start, region.stop, digest])
        for name in files if everything else written:
            files[name].sync()
    return written


def _to_write(pieces: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.writes and not piece.region.empty]


def _seal(unfinished: Path, step: int, told: list[Any], state: Mapping[str, Any]) -> None:
    """The state, and last of all the manifest."""
    regions: dict[str, list[RegionRecord]] = defaultdict(list)
    for name, boxes in ((name, boxes) for told_by_rank in told for name, boxes in told_by_rank.items()):
        for tensor, start, stop, digest in boxes:
            regions[name].append(RegionRecord(tensor=tensor, start=start, stop=stop, sha256=digest))
    for file in unfinished.glob("rank-*.json"):
        file.unlink()
    write_file(unfinished / STATE, json.dumps(state, indent=1).encode())
    records = {}
    for file in sorted(path for path in unfinished.rglob("*") if path.is_file()):
        name, size = file.relative_to(unfinished).as_posix(), file.stat().st_size
        if file.suffix == ".safetensors":
            with TensorFile(file) as tensors:
                check_cover(name, regions[name], {entry.name: entry.sizes for entry in tensors.entries.values()})
            header = sha256(read_header(file)).hexdigest()
            records[name] = FileRecord(size=size, header=header, regions=regions[name])
        else:
            sync(file)
            records[name] = FileRecord(size=size, sha256=sha256(file.read_bytes()).hexdigest())
    manifest = Manifest(step=step, layout=state["layout"], files=records)
    write_file(unfinished / MANIFEST, manifest.to_json())


def _tell(unfinished: Path, rank: int, what: str, content: Any) -> None:
    write_file(unfinished / f"rank-{rank}.{what}.json", json.dumps(content).encode())


def _told(unfinished: Path, world: int, what: str) -> list[Any]:
    return [json.loads((unfinished / f"rank-{rank}.{what}.json").read_bytes()) for rank in range(world)]


@contextmanager
def _named(step: int, rank: int) -> Iterator[None]:
    """Say of which step and rank an error is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                step, rank, f"{error}. Free some room, or lower checkpoint.keep; the older checkpoints are untouched"
            ) from error
        raise SaveError(step, rank, f"{error}; the older checkpoints are untouched") from error
    except SaveError:
        raise
    except ValueError as error:
        raise SaveError(step, rank, str(error)) from error
