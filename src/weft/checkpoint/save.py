"""Checkpointer: saves of a run, in the background, one at a time."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.distributed import ProcessGroup

import weft
from weft.checkpoint.agreement import Agreement, ElsewhereError, LostError
from weft.checkpoint.folder import sweep
from weft.checkpoint.manifest import FORMAT, DamageError
from weft.checkpoint.region import Piece
from weft.checkpoint.retention import retain
from weft.checkpoint.staging import Staging
from weft.checkpoint.weights import SHARD_BYTES
from weft.checkpoint.write import CheckpointError, DiskFullError, Plan, RemovalError, SaveError, write_checkpoint
from weft.models.shape import Shape

__all__ = ["CheckpointError", "Checkpointer", "DiskFullError", "RemovalError", "SaveError", "Stall"]


@dataclass(frozen=True)
class Stall:
    """Seconds that a save has held up the training.

    Attributes:
        waited: for the save before to end.
        copied: tensors into the staging buffers; without a background, the whole save.
    """

    waited: float
    copied: float


class Checkpointer:
    """Saves checkpoints into `folder`, and removes old ones.

    Make it once, on every process of the group, before looking for the newest checkpoint: what killed saves left
    behind is swept here.

    Args:
        folder: `<run>/checkpoints`, on a file system that every process sees.
        tokenizer: tokenizer.json, or the folder that holds it; copied into every checkpoint.
        keep: newest whole checkpoints kept.
        asynchronous: write in the background. Takes staging buffers: as much CPU memory as this process's tensors.
        group: a gloo group of this object's own, of all processes that save; None where there is one process. Nothing
            else may use it, for a thread does.
        tokens: ids of the tokenizer that belong into config.json: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        shard_bytes: largest tensor file.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        tokenizer: Path | None = None,
        keep: int = 2,
        asynchronous: bool = True,
        group: ProcessGroup | None = None,
        tokens: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least 1 checkpoint has to stay")
        if tokenizer is not None and not Path(tokenizer).exists():
            raise ValueError(f"data.tokenizer is {tokenizer}, which is not there; it is copied into every checkpoint")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.saved: int | None = None
        """Step of the last checkpoint that is whole and on the disk; known as soon as it is."""
        self.swept: list[str] = []
        """Names of what killed saves had left behind (on rank 0)."""
        self._plan = Plan(self.folder, shape, Path(tokenizer) if tokenizer else None, tokens, shard_bytes)
        self._agreement = Agreement(group)
        self._staging = Staging(), Staging()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        try:
            self._meet()
        except (OSError, ElsewhereError) as error:
            raise ValueError(f"{folder} cannot hold checkpoints: {error}; name another folder with `run`") from error

    def _meet(self) -> None:
        """Make the folder, or sweep it, and see that it is one to all processes: else no save would ever succeed."""
        main, mark = self._agreement.rank == 0, self.folder / "seen.tmp"
        with self._agreement.together():
            if main:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.swept = sweep(self.folder)
                mark.touch()
        try:
            with self._agreement.together():
                if not mark.exists():
                    raise OSError(
                        f"on the machine of rank {self._agreement.rank} it is another folder than on rank 0's"
                    )
        finally:
            if main:
                mark.unlink(missing_ok=True)

    def save(self, step: int, model: Sequence[Piece], optimizer: Sequence[Piece], state: Mapping[str, Any]) -> Stall:
        """Save a step. Every process calls this, at the same step.

        Args:
            model: of each parameter, the region that this process holds, under weft's names; stored in fp32.
            optimizer: of each optimizer tensor: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, and any other name;
                stored in the dtype they come in.
            state: JSON: `layout`, and whatever a resume needs. Rank 0's is stored.

        Returns:
            How long the training was held up.

        Raises:
            CheckpointError: the save before this one has failed, on any process, or this one, where there is no
                background: DiskFullError, SaveError, RemovalError. Every process raises, and nothing new has begun; the
                training may go on and save again.
            ValueError: `state` is not JSON, or has no layout.
        """
        content = _checked_state(step, state)
        waited = self.wait()
        begin = perf_counter()
        if self.asynchronous:
            model, optimizer = (
                staging.copy(pieces) for staging, pieces in zip(self._staging, (model, optimizer), strict=True)
            )
            self._running = self._writer.submit(self._save, step, model, optimizer, content)
        else:
            self._save(step, model, optimizer, content)
        return Stall(waited, perf_counter() - begin)

    def wait(self) -> float:
        """Wait until nothing is being saved; the seconds that took.

        Raises:
            CheckpointError: the save in the background has failed.
        """
        begin = perf_counter()
        running, self._running = self._running, None
        if running is not None:
            running.result()
        return perf_counter() - begin

    def close(self) -> None:
        """Finish what is being saved, and end the thread. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _save(self, step: int, model: Sequence[Piece], optimizer: Sequence[Piece], state: dict[str, Any]) -> None:
        path = write_checkpoint(self._plan, self._agreement, step, model, optimizer, state)
        self.saved = step
        rank = self._agreement.rank
        try:
            with self._agreement.together():
                if rank == 0:
                    retain(self.folder, self.keep, path)
        except (OSError, DamageError, LostError) as error:
            raise RemovalError(step, rank, str(error)) from error
        except ElsewhereError as error:
            raise RemovalError(step, error.rank, error.words) from error


def _checked_state(step: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the state as it is now, with versions."""
    if not isinstance(state.get("layout"), str):
        raise ValueError("the state of a checkpoint names its layout: give it a text under 'layout'")
    if state.get("step", step) != step:
        raise ValueError(f"the state is of step {state['step']}, and the checkpoint of step {step}")
    versions = {"weft": weft.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        copy = json.loads(json.dumps({**state, "format": FORMAT, "step": step, "versions": versions}))
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint is written as JSON: {error}") from error
    assert isinstance(copy, dict)
    return copy
