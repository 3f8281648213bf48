"""Saves: the checkpoints that a run makes while it trains. One that fails is said, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from weft.checkpoint.save import Checkpointer, CheckpointError, RemovalError
from weft.config.tree import Config
from weft.data.loader import Loader
from weft.train.run import Run
from weft.train.training import Training
from weft.train.view import View
from weft.train.words import special_tokens


class Saves:
    """Made before looking for the newest checkpoint: it sweeps away what killed saves left.

    Attributes:
        step: the last that is saved, or being saved.
        view: is told what happens.
    """

    def __init__(self, config: Config, run: Run, loader: Loader, group: dist.ProcessGroup | None) -> None:
        self.step = 0
        self.view = View()
        self.shown: int | None = None
        self.checkpointer = Checkpointer(
            run.checkpoints,
            config.model,
            Path(config.data.tokenizer) if config.data.tokenizer else None,
            config.checkpoint.keep,
            config.checkpoint.asynchronous,
            group,
            special_tokens(config, loader),
        )

    def save(self, step: int, training: Training, state: dict[str, Any], *, leaving: bool = False) -> None:
        """Save a step, in the background once the copy is made.

        Args:
            leaving: no step follows: a failure is an error.
        """
        self.wait()
        if self.step == step:
            return
        try:
            self.checkpointer.save(step, training.woven.pieces(), training.optimizer.pieces(), state)
            self.step = step
        except CheckpointError as error:
            self._failed(step, error, leaving)

    def wait(self, *, leaving: bool = False) -> None:
        """Until nothing is being saved."""
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            self._failed(self.step, error, leaving)
        self.show()

    def show(self) -> None:
        """Say that a checkpoint is whole on the disk, once it is: a save in the background ends some steps later."""
        if self.checkpointer.saved not in (None, self.shown):
            self.shown = self.checkpointer.saved
            self.view.saved(self.shown)

    def keep_all(self) -> None:
        """No older checkpoint goes for the next: it may be that one's state that is to blame for what is wrong."""
        self.checkpointer.keep += 1

    def _failed(self, step: int, error: CheckpointError, leaving: bool) -> None:
        saved = isinstance(error, RemovalError)
        if leaving and not saved:
            raise error
        self.step = step if saved else 0
        self.view.note(f"{error}; training goes on" if not leaving else str(error))
