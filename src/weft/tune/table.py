"""What trials have found, beside what was predicted: kept as JSON, shown as a table. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from weft.config.tree import Config
from weft.tune.candidates import Candidate
from weft.tune.trial import Result
from weft.units import gibibytes
from weft.whole import write_whole

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One layout: predicted, and, once it has been tried, measured."""

    layout: str
    predicted_seconds: float
    predicted_memory: int
    result: Result | None = None

    @property
    def error(self) -> float | None:
        """Of the predicted time, of the measured one."""
        measured = self.result.seconds if self.result else None
        return self.predicted_seconds / measured - 1 if measured else None


@dataclass(frozen=True)
class TuneTable:
    """The trials of one run on one cluster.

    Attributes:
        of: what the trials depend on beside the layout, as a digest: of another model or batch, they say nothing here.
    """

    of: str
    rows: tuple[Row, ...] = field(default=())

    @classmethod
    def read(cls, path: Path, of: str) -> TuneTable:
        """What an earlier call has left there; nothing, where that is of another run, or nothing is there.

        Raises:
            ValueError: the file is no such table.
        """
        if not path.exists():
            return cls(of)
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Row(**{**row, "result": _result(row["result"])}) for row in tree["rows"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} is no table of trials: move it away, or name another --out") from None
        return cls(of, rows) if tree.get("of") == of and tree.get("version") == VERSION else cls(of)

    def write(self, path: Path) -> None:
        tree = {"version": VERSION, "of": self.of, "rows": [asdict(row) for row in self.rows]}
        write_whole(path, json.dumps(tree, indent=2) + "\n")

    def planned(self, candidates: list[Candidate]) -> TuneTable:
        """Rows of these candidates, in their order, with what was measured of them; then what else was measured. What has
        failed is to be tried again: the reason may be gone."""
        known = {row.layout: row for row in self.rows if row.result is not None and row.result.seconds is not None}
        rows = [
            replace(known.get(name, Row(name, 0.0, 0)), predicted_seconds=one.seconds, predicted_memory=one.memory)
            for name, one in ((str(one.layout), one) for one in candidates)
        ]
        names = {row.layout for row in rows}
        return replace(self, rows=(*rows, *(row for name, row in known.items() if name not in names)))

    def found(self, layout: str, result: Result) -> TuneTable:
        rows = tuple(replace(row, result=result) if row.layout == layout else row for row in self.rows)
        return replace(self, rows=rows)

    @property
    def waiting(self) -> list[Row]:
        return [row for row in self.rows if row.result is None]

    @property
    def winner(self) -> Row | None:
        """The fastest that was measured."""
        done = [row for row in self.rows if row.result is not None and row.result.seconds is not None]
        return min(done, key=lambda row: row.result.seconds or 0.0) if done else None  # type: ignore[union-attr]

    @property
    def mean_error(self) -> float | None:
        """Mean of the sizes of the errors of predicted times."""
        errors = [abs(row.error) for row in self.rows if row.error is not None]
        return sum(errors) / len(errors) if errors else None


def _result(tree: dict[str, Any] | None) -> Result | None:
    return None if tree is None else Result(**{**tree, "steps": tuple(tree["steps"])})


def digest(config: Config, steps: int) -> str:
    """Of everything that a trial's time depends on, but the layout."""
    tree = config.model_dump(mode="json", include={"model", "data", "optimizer", "balance"})
    tree |= {"batch": config.train.global_batch, "seq": config.seq, "device": config.train.device, "steps": steps}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def show_table(table: TuneTable, console: Console) -> None:
    """Predicted next to measured, the fastest measured first."""
    shown = RichTable(box=None, padding=(0, 2), header_style="bold")
    for name in ("layout", "predicted", "measured", "error", "memory predicted", "measured", ""):
        shown.add_column(name, justify="left" if name in ("layout", "") else "right")
    winner = table.winner
    for row in sorted(table.rows, key=lambda row: (row.result.seconds if row.result else None) or float("inf")):
        result = row.result
        measured = f"{result.seconds:.4g} s" if result and result.seconds else "–"
        error = f"{row.error:+.0%}" if row.error is not None else "–"
        memory = gibibytes(result.memory) if result and result.memory else "–"
        note = "← fastest" if row == winner else result.failed if result else "not run"
        shown.add_row(
            row.layout, f"{row.predicted_seconds:.4g} s", measured, error, gibibytes(row.predicted_memory), memory, note,
            style="bold cyan" if row == winner else None,
        )  # fmt: skip
    console.print(shown)
    if table.mean_error is not None:
        console.print(f"mean error of the predicted times: {table.mean_error:.0%}", highlight=False)
