"""Folder: the names of checkpoints on disk, how one appears at once and how one goes. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model"
OPTIMIZER = "optimizer"
CERTIFICATE = "parity.json"
"""What `weft verify serve` lays beside it later; no part of what was written, and not listed in the manifest."""

_STEP = re.compile(r"step-(\d{8,})")


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def unfinished_path(folder: Path, step: int) -> Path:
    """Where a checkpoint lies while it is written; it is no checkpoint before its rename."""
    return folder / f"step-{step:08d}.tmp"


def step_of(path: Path) -> int | None:
    """The step that a folder's name says, or None where it is not the name of a checkpoint."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """Every finished checkpoint, newest first, whole or not."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(paths, key=lambda path: step_of(path) or 0, reverse=True)


def publish(unfinished: Path, path: Path) -> None:
    """Give a finished checkpoint its name. One of that name that is there already steps aside first."""
    for folder in (unfinished / MODEL, unfinished / OPTIMIZER, unfinished):
        sync(folder)
    aside = _aside(path)
    if path.exists():
        os.rename(path, aside)
    os.rename(unfinished, path)
    sync(path.parent)
    if aside.exists():
        shutil.rmtree(aside)


def discard(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that one half removed is never seen."""
    debris = path.with_name(f"{path.name}.removed.tmp")
    if debris.exists():
        shutil.rmtree(debris)
    os.rename(path, debris)
    sync(path.parent)
    shutil.rmtree(debris)


def sweep(folder: Path) -> list[str]:
    """Clear what killed saves and removals left behind; the names of what was swept.

    Call it while nothing is being saved. A checkpoint that had stepped aside for a successor which never came gets
    its name back.
    """
    swept = []
    for path in sorted(folder.glob("step-*.tmp")) if folder.is_dir() else []:
        original = path.with_name(path.name.removesuffix(".replaced.tmp"))
        if original != path and not original.exists():
            os.rename(path, original)
        elif path.is_dir():
            shutil.rmtree(path)
            swept.append(path.name)
    return swept


def write_file(path: Path, content: bytes) -> None:
    """A small file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.replaced.tmp")
