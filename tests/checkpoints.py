"""Checkpoints without a training, for all tests."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from weft.checkpoint.manifest import FileRecord, Manifest


def save_step(source: Path, run: Path, step: int) -> Path:
    """A finished checkpoint of a run, of the weights in a Hugging Face directory."""
    path = run / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(source, path / "model")
    files = {}
    for file in sorted((path / "model").iterdir()):
        content = file.read_bytes()
        files[f"model/{file.name}"] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (path / "manifest.json").write_bytes(Manifest(step=step, layout="dp1", files=files).to_json())
    return path
