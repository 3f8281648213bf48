"""What an export is made from: a Hugging Face directory as it is, or that of a checkpoint that is whole to the byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

from weft.checkpoint.folder import MANIFEST, MODEL
from weft.checkpoint.inspection import read_header
from weft.checkpoint.manifest import FileRecord, read_manifest
from weft.checkpoint.tensors import TensorFile


def check_source(model: Path) -> bool:
    """Hold the weights of a checkpoint against its manifest, byte for byte. False: this is no checkpoint's folder.

    Raises:
        ValueError: names the file, and the tensor, that is not as it was written.
    """
    checkpoint = model.parent
    if model.name != MODEL or not (checkpoint / MANIFEST).is_file():
        return False
    for name, record in read_manifest(checkpoint).files.items():
        if name.startswith(f"{MODEL}/") and (what := _damage(checkpoint / name, record)):
            raise ValueError(f"{checkpoint / name} is damaged: {what}; export an older checkpoint")
    return True


def _damage(file: Path, record: FileRecord) -> str:
    """What differs from the manifest, or nothing."""
    if not file.is_file():
        return "it is missing"
    if file.stat().st_size != record.size:
        return f"it has {file.stat().st_size} bytes where {record.size} were written"
    if record.header is None:
        return "" if hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256 else "its sha256 differs"
    if hashlib.sha256(read_header(file)).hexdigest() != record.header:
        return "the sha256 of its header differs"
    with TensorFile(file) as tensors:
        for region in record.regions:
            if tensors.digest(region.tensor, tuple(region.start), tuple(region.stop)) != region.sha256:
                return f"the sha256 of {region} differs"
    return ""
