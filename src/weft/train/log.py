"""The log of a run: JSON lines, one for each logged step, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from weft.parallel.balance import Routing
from weft.train.metrics import Metrics

FILE = "log.jsonl"
ROUTING = "routing.jsonl"
"""Where a run with experts tells the load of each of them."""
SCALARS = {
    "loss": "loss/train",
    "valid_loss": "loss/valid",
    "balance_loss": "experts/balance_loss",
    "busiest_expert": "experts/busiest",
    "load_entropy": "experts/load_entropy",
    "dropped": "experts/dropped",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "mfu_causal": "speed/mfu_causal",
    "seconds": "speed/step_seconds",
    "data_wait": "speed/data_wait_seconds",
    "checkpoint_wait": "speed/checkpoint_wait_seconds",
    "memory": "memory/bytes",
}
"""TensorBoard's name of each number."""


class RunLog:
    """Writes the steps of a run to its folder, from one process.

    A run that goes on after step k drops what an earlier attempt logged beyond k, so each step stands in the log once.
    Training does not end because nothing can be written, as on a full disk: that is said, and lines wait for room.
    """

    def __init__(
        self,
        run: Path,
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        active: bool = True,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            run: folder of the run; made where it is missing.
            start_step: the last step that is done: 0 for a new run, the checkpoint's for a resumed one.
            tensorboard: write `run/tensorboard/` as well.
            active: False in every process but rank 0: nothing is written.
            note: is told that something cannot be written.
        """
        self.steps: Lines | None = None
        self.board: Any = None
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        cut_log(run / FILE, start_step, note)
        cut_log(run / ROUTING, start_step, note)
        self.note = note
        self.steps, self.routing = Lines(run / FILE, note), Lines(run / ROUTING, note)
        if tensorboard:
            self.board = _summary_writer(run / "tensorboard", start_step)

    def write(self, metrics: Metrics) -> None:
        """Add one step. It is with the operating system before this returns, if that takes it."""
        if self.steps is None:
            return
        values = {name: _finite(value) for name, value in metrics.as_dict().items()}
        self.steps.add(values)
        try:
            for name, tag in SCALARS.items() if self.board is not None else ():
                if values[name] is not None:
                    self.board.add_scalar(tag, values[name], metrics.step, walltime=metrics.time)
        except OSError as error:
            self.board = None  # its thread has ended
            self.note(
                f"tensorboard/ cannot be written, {error}, and ends at step {metrics.step}; {FILE} has every step"
            )

    def write_routing(self, step: int, routing: Routing) -> None:
        """Add the load of each expert, by block."""
        if self.steps is not None:
            load, dropped = routing.load.long().tolist(), routing.dropped.long().tolist()
            self.routing.add({"step": step, "load": load, "dropped": dropped})

    def close(self) -> None:
        if self.steps is None:
            return
        self.steps.write()
        self.routing.write()
        if self.board is not None:
            with suppress(OSError):
                self.board.close()
        self.steps = self.board = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines:
    """A file that lines of JSON are added to. What cannot be written waits for the next line; no line is torn by that."""

    def __init__(self, file: Path, note: Callable[[str], None]) -> None:
        self.file, self.note, self.waiting, self.refused = file, note, b"", False

    def add(self, record: Mapping[str, Any]) -> None:
        self.waiting += (json.dumps(record, allow_nan=False) + "\n").encode()
        self.write()

    def write(self) -> None:
        if not self.waiting:
            return
        try:
            with open(self.file, "ab", buffering=0) as out:
                while self.waiting:
                    self.waiting = self.waiting[out.write(self.waiting) :]
        except OSError as error:
            if not self.refused:
                self.note(f"{error}: {self.file} cannot be written; lines wait until it can be, and training goes on")
            self.refused = True
        else:
            self.refused = False


def _refuse(damage: str) -> None:
    raise ValueError(damage)


def read_log(run: str | Path, name: str = FILE, damaged: Callable[[str], None] = _refuse) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; a number that was not finite is None.

    Args:
        name: FILE, or ROUTING.
        damaged: is told of each line before the last that is no step; such lines are left out.

    Raises:
        ValueError: there is no log, or `damaged` was not given and a line is damaged.
    """
    file = Path(run) / name
    if not file.is_file():
        raise ValueError(f"there is no log {file}: is {run} the folder of a run?")
    return _records(file, damaged)


def cut_log(file: Path, step: int, note: Callable[[str], None]) -> None:
    """Drop all lines after `step`, and a last line that was cut off; at once or not at all.

    A log that a disk damaged keeps no run from going on: the file as it was stays beside it.
    """
    if not file.exists():
        return
    damages: list[str] = []
    kept = [record for record in _records(file, damages.append) if record["step"] <= step]
    if damages:
        copy = shutil.copy(file, file.with_suffix(".damaged"))
        more = f", with {len(damages) - 1} more" if len(damages) > 1 else ""
        note(f"{damages[0]}: left out{more}; the file as it was is {copy}")
    beside = file.with_suffix(".tmp")
    with open(beside, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in kept)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)


def _records(file: Path, damaged: Callable[[str], None]) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):  # what follows the last newline: nothing, or a line written when the run died
            damaged(f"{file}, line {number} is no step of a run: {line[:60]!r}")
    return records


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(folder: Path, start_step: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
