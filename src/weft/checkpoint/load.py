"""Loading: the newest checkpoint that is whole, and each process's regions of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from weft.checkpoint.agreement import Agreement, ElsewhereError
from weft.checkpoint.folder import MODEL, OPTIMIZER, STATE, checkpoints
from weft.checkpoint.inspection import Finding, inspect
from weft.checkpoint.manifest import DamageError, check_format, read_manifest
from weft.checkpoint.region import Piece
from weft.checkpoint.tensors import TensorFile
from weft.checkpoint.weights import WeightsFolder


def newest(folder: Path, group: ProcessGroup | None = None) -> tuple[Path | None, list[Finding]]:
    """The newest checkpoint that is whole, to the last byte, and what was found wrong on the way to it.

    Every process of the group calls this, and reads its share of the files; all get the same answer, for the caller to
    print: a finding is damage where the checkpoint is another than the one returned.

    Returns:
        None, and no findings, where there has never been a checkpoint.

    Raises:
        ValueError: there are checkpoints, and none is whole, for a run must not start over by itself; or one is in a
            format that this weft does not read.
    """
    agreement = Agreement(group)
    # one process looks: a network file system may show another an older listing
    listed = agreement.texts("\n".join(map(str, checkpoints(Path(folder)))) if agreement.rank == 0 else "")[0]
    findings: list[Finding] = []
    for path in map(Path, listed.split("\n") if listed else []):
        found = _inspect_together(path, agreement)
        findings += found
        if not any(finding.damaging for finding in found):
            return path, findings
    if not listed:
        return None, []
    damage = "\n".join(f"  {finding}" for finding in findings if finding.damaging)
    raise ValueError(
        f"none of the checkpoints in {folder} is whole, and a run does not start over by itself:\n{damage}\n"
        "Bring back a whole one, or name another folder with `run` to start from scratch"
    )


def load(path: Path, model: Sequence[Piece] = (), optimizer: Sequence[Piece] = ()) -> dict[str, Any]:
    """Fill the data of every piece, in place, with its region; the state comes back.

    The pieces may be cut in any way, whatever the layout that saved. Contents are not compared with the manifest here:
    `newest` has done it, or `weft verify checkpoint`.

    Raises:
        ValueError: the checkpoint is not finished, or of a format that this weft does not read; it lacks a tensor, or
            has it in another size.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with ExitStack() as stack:
        weights = stack.enter_context(WeightsFolder.open(path / MODEL))
        for piece in model:
            place = weights.places.get(piece.region.name)
            _check_sizes(path / MODEL, piece, place.weft_sizes if place else None)
            if not piece.region.empty:
                piece.data.detach().copy_(weights.read(piece.region))
        files: dict[str, TensorFile] = {}
        for name in manifest.files if optimizer else ():
            if name.startswith(f"{OPTIMIZER}/"):
                file = stack.enter_context(TensorFile(path / name))
                files |= dict.fromkeys(file.entries, file)
        for piece in optimizer:
            name = piece.region.name
            _check_sizes(path / OPTIMIZER, piece, files[name].entry(name).sizes if name in files else None)
            if not piece.region.empty:
                piece.data.detach().copy_(files[name].read(name, piece.region.start, piece.region.stop))
    return read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, layout, versions, and what the trainer gave."""
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DamageError(f"{file} is missing; `weft verify checkpoint {path}` lists all that is wrong") from error
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{file} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise DamageError(f"{file} is not a table")
    check_format(state.get("format"), file)
    return state


def _check_sizes(folder: Path, piece: Piece, found: tuple[int, ...] | None) -> None:
    if found is None:
        raise ValueError(f"{folder} holds no {piece.region.name}: the checkpoint is of another model or optimizer")
    if found != piece.region.sizes:
        raise ValueError(
            f"{folder}: {piece.region.name} is {list(found)} and {list(piece.region.sizes)} is asked for: "
            "the checkpoint is of a model of another shape"
        )


def _inspect_together(path: Path, agreement: Agreement) -> list[Finding]:
    """What all processes together find; the same list on each."""
    mine: list[Finding] = []
    try:
        with agreement.together():
            mine = inspect(path, agreement.rank, agreement.world)
    except ElsewhereError as error:
        raise ValueError(f"{path} could not be checked: {error}") from error
    texts = agreement.texts(json.dumps([asdict(finding) for finding in mine]) if mine else "")
    findings = [Finding(**finding) for text in texts if text for finding in json.loads(text)]
    return list(dict.fromkeys(findings))
