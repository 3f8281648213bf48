"""What trials have found, beside what was predicted: kept as JSON, shown as a table. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from weft.config.tree import Config
from weft.tables import print_table
from weft.tune.candidates import Candidate, kept_of
from weft.tune.trial import Result
from weft.units import gibibytes
from weft.whole import write_whole

VERSION = 2


@dataclass(frozen=True)
class Row:
    """One layout: predicted, and, once it has been tried, measured.

    Attributes:
        predicted_seconds: by the plan alone.
        expected_seconds: by the plan and the trials before this one.
        results: of its trials, each of twice as many steps as the one before.
        change: what it is a change of, where no plan has proposed it; empty: one has.
        settings: of [train], those that are not the run's own.
    """

    layout: str
    predicted_seconds: float
    predicted_memory: int
    expected_seconds: float
    results: tuple[Result, ...] = ()
    change: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, one: Candidate, expected: float) -> Row:
        return cls(str(one.layout), one.seconds, one.memory, expected)

    @property
    def name(self) -> str:
        """The layout, and what else is not the run's own."""
        return named(self.layout, self.settings)

    @property
    def result(self) -> Result | None:
        """The last, which is the longest."""
        return self.results[-1] if self.results else None

    @property
    def seconds(self) -> float | None:
        return self.result.seconds if self.result else None

    @property
    def num_steps(self) -> int:
        """Of the last trial, those that count; 0: there was none, or it failed."""
        return len(self.result.steps) if self.result else 0

    @property
    def error(self) -> float | None:
        """Of the predicted time, of the measured one."""
        return self.predicted_seconds / self.seconds - 1 if self.seconds else None

    @property
    def surprise(self) -> float | None:
        """Of the expected time, of the measured one."""
        return self.expected_seconds / self.seconds - 1 if self.seconds else None


@dataclass(frozen=True)
class TuneTable:
    """The trials of one run on one cluster, in the order in which they were first made.

    Attributes:
        of: what the trials depend on beside the layout, as a digest: of another model or batch, they say nothing here.
    """

    of: str
    rows: tuple[Row, ...] = field(default=())

    @classmethod
    def read(cls, path: Path, of: str) -> TuneTable:
        """What an earlier call has measured; nothing, where that is of another run, or nothing is there. What has failed is
        forgotten: the reason may be gone.

        Raises:
            ValueError: the file is no such table.
        """
        if not path.exists() or (found := cls.stored(path)).of != of:
            return cls(of)
        return cls(of, tuple(found.measured))

    @classmethod
    def stored(cls, path: Path) -> TuneTable:
        """What is in the file, whatever it is of.

        Raises:
            ValueError: the file is no such table.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["version"] != VERSION:
                return cls(f"version {tree['version']}")
            rows = [Row(**{**row, "results": tuple(map(_result, row["results"]))}) for row in tree["rows"]]
            return cls(tree["of"], tuple(rows))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} is no table of trials: move it away, or name another --out") from None

    def write(self, path: Path) -> None:
        tree = {"version": VERSION, "of": self.of, "rows": [asdict(row) for row in self.rows]}
        write_whole(path, json.dumps(tree, indent=2) + "\n")

    def with_row(self, row: Row) -> TuneTable:
        """With this one in the place of the one of its name, or as the last."""
        if row.name not in [other.name for other in self.rows]:
            return TuneTable(self.of, (*self.rows, row))
        return TuneTable(self.of, tuple(row if other.name == row.name else other for other in self.rows))

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.seconds is not None]

    @property
    def winner(self) -> Row | None:
        """The fastest of those that were measured longest."""
        longest = max((row.num_steps for row in self.measured), default=0)
        final = [row for row in self.measured if row.num_steps == longest]
        return min(final, key=lambda row: row.seconds or 0.0, default=None)


def set_aside(path: Path, of: str) -> Path | None:
    """Give a table that is there and of another run that run's name, which is returned; one that was given this run's name
    before comes back.

    Raises:
        ValueError: the file is no table.
    """
    if not path.exists() or (there := TuneTable.stored(path).of) == of:
        return None
    kept = path.replace(_named_for(path, there))
    if _named_for(path, of).exists():
        _named_for(path, of).replace(path)
    return kept


def _named_for(path: Path, of: str) -> Path:
    return path.with_suffix(f".{of.replace(' ', '')}.json")


def named(layout: str, settings: dict[str, Any]) -> str:
    return " ".join([layout, *(f"{name}={value}" for name, value in sorted(settings.items()))])


def mean_error(errors: Iterable[float | None]) -> float | None:
    """Mean of the sizes of those that are known."""
    known = [abs(error) for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def _result(tree: dict[str, Any]) -> Result:
    return Result(**{**tree, "steps": tuple(tree["steps"])})


def digest(config: Config, steps: int, processes: int) -> str:
    """Of everything that a trial's time depends on, but what is tried of the layout."""
    tree = config.model_dump(mode="json", include={"model", "data", "optimizer", "balance"})
    tree |= {"attention": config.train.attention, "bucket_mib": config.train.bucket_mib}
    tree |= {"batch": config.train.global_batch, "seq": config.seq, "device": config.train.device, "steps": steps}
    tree |= {"processes": processes, **kept_of(config.layout)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def show_table(table: TuneTable, console: Console) -> None:
    """Predicted next to measured, the fastest measured first; then how far off predictions were."""
    shown = RichTable(box=None, padding=(0, 2), header_style="bold")
    names = ("layout", "planned", "expected", "measured", "error", "steps", "memory planned", "measured", "")
    for name in names:
        shown.add_column(name, justify="left" if name in ("layout", "") else "right")
    winner = table.winner
    for row in sorted(table.rows, key=lambda row: (-row.num_steps, row.seconds or float("inf"))):
        result = row.result
        measured = f"{row.seconds:.4g} s" if row.seconds else "–"
        error = f"{row.error:+.0%}" if row.error is not None else "–"
        memory = gibibytes(result.memory) if result and result.memory else "–"
        note = "← fastest" if row is winner else result.failed if result else "not run"
        shown.add_row(
            escape(row.name), f"{row.predicted_seconds:.4g} s", f"{row.expected_seconds:.4g} s", measured, error,
            f"{row.num_steps or '–'}", gibibytes(row.predicted_memory), memory, escape(note),
            style="bold cyan" if row is winner else None,
        )  # fmt: skip
    print_table(shown, console)
    planned, expected = mean_error(row.error for row in table.rows), mean_error(row.surprise for row in table.rows)
    if planned is not None:
        line = (
            f"mean error of the planned times: {planned:.0%}; of those expected from the plan and the trials before: "
        )
        console.print(f"{line}{expected:.0%}", highlight=False)
