"""Tune: try the layouts that the plan thinks best, learn from each, and keep the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.tune.candidates import Candidate, Candidates
from weft.tune.lesson import Lesson
from weft.tune.picture import draw_trials
from weft.tune.table import Row, TuneTable
from weft.tune.trial import Result, run_trial, trial_config
from weft.tune.variants import KNOBS


@dataclass
class Session:
    """Trials of a run, one after the other. After each, the table and the picture are written: what stops this later loses
    one trial at most, and the same session with that table goes on from there.

    Attributes:
        top: layouts of the plan that are tried, beside the run's own.
        steps: of a first trial that count; each later one has twice as many.
        limit: seconds that a trial may take.
        out: the config file to be; the table and the picture are beside it, and a folder of the trials.
        say: told of each trial before it starts.
    """

    config: Config
    candidates: Candidates
    table: TuneTable
    top: int
    steps: int
    limit: float
    out: Path
    say: Callable[[str], None]

    def run(self, *, vary: bool) -> TuneTable:
        """Look at the plan's best, halve them, and, if wanted, vary the winner."""
        self.look()
        rounds = self.halve()
        if vary:
            self.vary(rounds)
        return self.table

    def look(self) -> None:
        """The run's own layout, then the plan's best, each chosen by what those before it have shown."""
        own = self.candidates.own
        if own is not None and self.table.row(str(own)) is None:
            self.say(f"the run's own layout, {own}")
            self._try(self._row(self.candidates.of(own)), 0)
        proposed = [row for row in self.table.rows if not row.change and row.layout != str(own)]
        for number in range(len(proposed) + 1, self.top + 1):
            tried = [Layout.parse(row.layout) for row in self.table.rows]
            for one in self.candidates.best(1, self.lesson, tried):
                row = self._row(one)
                self.say(f"layout {number} of {self.top}: {row.layout}, expected {row.expected_seconds:.4g} s")
                self._try(row, 0)

    def halve(self) -> int:
        """Successive halving (Jamieson and Talwalkar, 2016): the faster half is run again for twice as long, and of that
        the faster half, until two are left, whose last trial decides. How often it was halved."""
        field, number = [row.layout for row in self.table.measured if not row.change], 0
        while len(field) > 2:
            number += 1
            field = self._faster(field, number - 1)[: -(-len(field) // 2)]
            for layout in field:
                row = self.table.row(layout)
                assert row is not None
                if len(row.results) <= number:
                    self.say(f"the faster half, {self.steps * 2**number} steps: {layout}")
                    self._try(row, number)
            field = self._faster(field, number)
        return number

    def vary(self, rounds: int) -> None:
        """Changes to the winner that no plan knows the worth of, one by one, until none helps."""
        before = None
        while (best := self.table.winner) is not None and best.layout != before:
            before = best.layout
            for knob in KNOBS:
                for layout in knob(Layout.parse(self.fastest), self.config.train.global_batch):
                    one = self._possible(layout)
                    if one is not None and self._shorter(str(one.layout), rounds):
                        self.say(f"the fastest, changed: {one.layout}")
                        row = self.table.row(str(one.layout)) or self._row(one, change=f"of {self.fastest}")
                        self._try(row, rounds)

    @property
    def fastest(self) -> str:
        """The layout that leads."""
        assert self.table.winner is not None
        return self.table.winner.layout

    @property
    def lesson(self) -> Lesson:
        """What the trials so far have shown of the plan."""
        return Lesson.of(list(self._seen()))

    def _seen(self) -> Iterator[tuple]:
        for row in self.table.measured:
            time = self.candidates.time(row.layout)
            if time is not None:
                yield time, row.seconds

    def _row(self, one: Candidate, change: str = "") -> Row:
        return Row.of(one, self.lesson.expected(one.time), change)

    def _shorter(self, layout: str, rounds: int) -> bool:
        """Whether this one is still to be tried, at all or for as long as the winner."""
        row = self.table.row(layout)
        return row is None or (bool(row.change) and row.num_steps < self.steps * 2**rounds)

    def _possible(self, layout: Layout) -> Candidate | None:
        """None: weft does not run it, or it does not fit."""
        try:
            one = self.candidates.of(Layout.model_validate(layout.model_dump()))
        except ValueError:
            return None
        return one if one.memory <= self.candidates.cluster.memory else None

    def _faster(self, field: list[str], number: int) -> list[str]:
        """Those that went through this round, the fastest first."""
        rows = [row for row in self.table.measured if row.layout in field and len(row.results) > number]
        return [row.layout for row in sorted(rows, key=lambda row: row.results[number].seconds or 0.0)]

    def _try(self, row: Row, number: int) -> None:
        result = self._trial(row, self.steps * 2**number)
        self.table = self.table.with_row(replace(row, results=(*row.results, result)))
        self.table.write(table_file(self.out))
        if self.table.measured:
            picture_file(self.out).write_text(draw_trials(self.table), encoding="utf-8")

    def _trial(self, row: Row, steps: int) -> Result:
        folder = trials(self.out)
        try:
            tried = trial_config(self.config, row.layout, steps, folder / "tokens")
        except ValueError as error:
            return Result(failed=str(error))
        return run_trial(tried, steps, self.limit, folder / row.layout)


def write_winner(config: Config, table: TuneTable, out: Path) -> Row:
    """The run's settings with the fastest layout, for `weft train`.

    Raises:
        ValueError: no trial ended well.
    """
    winner = table.winner
    if winner is None:
        reasons = "; ".join(f"{row.layout}: {row.result.failed if row.result else 'not run'}" for row in table.rows)
        raise ValueError(f"no layout was measured, so there is no config to write: {reasons}")
    tuned = make_config({**config.model_dump(), "layout": winner.layout})
    out.write_text(config_toml(tuned), encoding="utf-8")
    return winner


def table_file(out: Path) -> Path:
    return out.with_suffix(".json")


def picture_file(out: Path) -> Path:
    return out.with_suffix(".svg")


def trials(out: Path) -> Path:
    return out.with_name(f"{out.stem}-trials")
