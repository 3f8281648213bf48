"""The folder of a run: what lies in it, and whether a run may begin or go on there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from weft.checkpoint.folder import checkpoints
from weft.config.load import load_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.lock import alone
from weft.whole import write_whole

CONFIG = "config.toml"


@dataclass(frozen=True)
class Run:
    """`config.toml`, `log.jsonl`, `routing.jsonl`, `tensorboard/`, `loss.png`, `routing.png`, `logs/` of each rank,
    `checkpoints/step-…`, `profile/step-…`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def held(self) -> AbstractContextManager[None]:
        """Keep other jobs out of the folder: they would sweep away each other's half-written checkpoints.

        Raises:
            ValueError: a job is training there now.
        """
        return alone(
            self.path, f"another job is training in {self.path} now: wait for it, or give this one its own --run"
        )

    def claim(self, config: Config, resume: bool) -> None:
        """Make the folder ready for a run, and write down its settings.

        Raises:
            ValueError: there are checkpoints of an earlier run and it is not to be resumed, or resuming it with these
                settings would make it another run.
        """
        if checkpoints(self.checkpoints):
            if not resume:
                raise ValueError(
                    f"{self.path} holds a run with checkpoints: go on with --resume, or give the new run its own "
                    "folder with --run"
                )
            check_same_run(self.config(), config, self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG, config_toml(config))

    def config(self) -> Config:
        """The settings of the run as it was started last.

        Raises:
            ValueError: the folder holds no run.
        """
        return load_config([self.path / CONFIG])


def check_same_run(before: Config, now: Config, path: Path) -> None:
    """A resumed run may change its layout, length, rates and logging; not what it learns from, nor what it is."""
    fixed = {
        "model": (before.model, now.model),
        "train.seed": (before.train.seed, now.train.seed),
        "train.seq": (before.seq, now.seq),
        "data.paths": tuple([str(Path(name).absolute()) for name in config.data.paths] for config in (before, now)),
        "data.weights": (before.data.weights, now.data.weights),
        "data.split": (before.data.split, now.data.split),
        "data.document_mask": (before.data.document_mask, now.data.document_mask),
    }
    for name, (old, new) in fixed.items():
        if old != new:
            raise ValueError(
                f"{path} was trained with another {name}: {old}, now {new}. Put it back to resume, or start a new run "
                "with --run (and --init-from the model/ of its last checkpoint, to go on from its weights)"
            )
