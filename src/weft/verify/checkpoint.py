"""`weft verify checkpoint PATH`: is every byte of a checkpoint what was written? Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from weft.checkpoint.folder import MANIFEST, STATE, step_of
from weft.checkpoint.inspection import Finding, inspect
from weft.checkpoint.manifest import read_manifest


@dataclass(frozen=True)
class CheckpointReport:
    """What was compared, and every difference. `step` and what follows is None or 0 where there is no manifest.

    Attributes:
        size: bytes of all files that the manifest lists.
        regions: boxes of tensors that were compared one by one.
    """

    path: Path
    findings: tuple[Finding, ...]
    seconds: float
    step: int | None = None
    layout: str | None = None
    files: int = 0
    regions: int = 0
    size: int = 0

    @property
    def whole(self) -> bool:
        """Whether it may be loaded; files that somebody put beside it do not count against it."""
        return not any(finding.damaging for finding in self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        if self.step is not None:
            content = f"step {self.step}, layout {self.layout}: {self.files} files, {self.regions} regions, "
            lines.append(f"{content}{self.size:,} bytes in {self.seconds:.1f} s")
        return "\n".join([*lines, f"{self.path} is {'whole' if self.whole else 'DAMAGED'}"])


def verify_checkpoint(path: Path, threads: int | None = None) -> CheckpointReport:
    """Compare each file, header and region of a checkpoint with its manifest.

    Args:
        path: `step-…`, or a copy of one under any name.
        threads: read at a time; by default one a core, 8 at most.

    Raises:
        ValueError: there is no such folder, it is no checkpoint at all, or it is in a format that this weft does not read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: name one checkpoint, like runs/run/checkpoints/step-00001000")
    if step_of(path) is None and not any((path / name).exists() for name in (MANIFEST, STATE)):
        raise ValueError(f"{path} holds no checkpoint: name a run, or one of its, like checkpoints/step-00001000")
    begin = perf_counter()
    findings = tuple(inspect(path, threads=threads or min(8, os.cpu_count() or 1)))
    seconds = perf_counter() - begin
    if any(finding.file == MANIFEST for finding in findings):
        return CheckpointReport(path, findings, seconds)
    manifest = read_manifest(path)
    regions = sum(len(record.regions) for record in manifest.files.values())
    return CheckpointReport(
        path, findings, seconds, manifest.step, manifest.layout, len(manifest.files), regions, manifest.size
    )
