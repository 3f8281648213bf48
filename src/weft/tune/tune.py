"""Tune: try the layouts that the plan thinks best, learn from each, and keep the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.config.layout import Layout
from weft.config.load import make_config, merge
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.plan.time.step import Time
from weft.tune.candidates import Candidate, Candidates
from weft.tune.lesson import Lesson
from weft.tune.picture import draw_trials
from weft.tune.table import Row, TuneTable, named
from weft.tune.trial import Result, run_trial, trial_config
from weft.tune.variants import KNOBS, VARIED


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
        field, number = [row.name for row in self.table.measured if not row.change], 0
        while len(field) > 2:
            number += 1
            field = self._faster(field, number - 1)[: -(-len(field) // 2)]
            for name in field:
                row = self.table.row(name)
                assert row is not None
                if len(row.results) <= number:
                    self.say(f"the faster half, {self.steps * 2**number} steps: {name}")
                    self._try(row, number)
            field = self._faster(field, number)
        return number

    def vary(self, rounds: int) -> None:
        """Changes to the winner that no plan knows the worth of, one by one, until none helps."""
        before = None
        while (best := self.table.winner) is not None and best.name != before:
            before = best.name
            for knob in KNOBS:
                base = self.table.winner
                assert base is not None
                for changes in knob(run_of(self.config, base), self.candidates.device):
                    row = self._changed(base, changes)
                    if row is not None and row.num_steps < self.steps * 2**rounds:
                        self.say(f"the fastest, changed: {row.name}")
                        self._try(row, rounds)

    def _changed(self, base: Row, changes: dict[str, Any]) -> Row | None:
        """A row with changes to its settings; None: weft does not run it, it does not fit, or the plan proposed it."""
        try:
            config = make_config(merge(run_of(self.config, base).model_dump(), changes))
            one = self.candidates.of(config.layout)
        except ValueError:
            return None
        own = {name: getattr(self.config.train, name) for name in VARIED}
        values = {name: getattr(config.train, name) for name in VARIED}
        settings = {name: value for name, value in values.items() if value != own[name]}
        known = self.table.row(named(str(one.layout), settings))
        if one.memory > self.candidates.cluster.memory or (known is not None and not known.change):
            return None
        return known or replace(self._row(one), change=f"of {base.name}", settings=settings)

    @property
    def lesson(self) -> Lesson:
        """What the trials so far have shown of the plan."""
        return Lesson.of(list(self._seen()))

    def _seen(self) -> Iterator[tuple]:
        for row in self.table.measured:
            time = self.candidates.time(row.layout)
            if time is not None and not row.settings:
                yield time, row.seconds

    def _row(self, one: Candidate) -> Row:
        return Row.of(one, self.lesson.expected(one.time))

    def _faster(self, field: list[str], number: int) -> list[str]:
        """Those that went through this round, the fastest first."""
        rows = [row for row in self.table.measured if row.name in field and len(row.results) > number]
        return [row.name for row in sorted(rows, key=lambda row: row.results[number].seconds or 0.0)]

    def _try(self, row: Row, number: int) -> None:
        result = self._trial(row, self.steps * 2**number)
        self.table = self.table.with_row(replace(row, results=(*row.results, result)))
        self.table.write(table_file(self.out))
        if self.table.measured:
            picture_file(self.out).write_text(draw_trials(self.table), encoding="utf-8")

    def _trial(self, row: Row, steps: int) -> Result:
        folder = trials(self.out)
        try:
            tried = trial_config(run_of(self.config, row), steps, folder / "tokens")
        except ValueError as error:
            return Result(failed=str(error))
        return run_trial(tried, steps, self.limit, folder / row.name.replace(" ", "."))


def planned_anew(table: TuneTable, candidates: Candidates) -> TuneTable:
    """What was measured, beside what the plan says of it now: the cluster file may have been measured again since."""
    plans = [candidates.of(Layout.parse(row.layout)) for row in table.rows]
    pairs = list(zip(table.rows, plans, strict=True))
    if all((row.predicted_seconds, row.predicted_memory) == (one.seconds, one.memory) for row, one in pairs):
        return table
    renewed: list[Row] = []
    seen: list[tuple[Time, float]] = []
    for row, one in pairs:
        fresh = Row.of(one, Lesson.of(seen).expected(one.time))
        renewed.append(replace(fresh, results=row.results, change=row.change, settings=row.settings))
        if row.seconds and not row.settings:
            seen.append((one.time, row.seconds))
    return TuneTable(table.of, tuple(renewed))


def write_winner(config: Config, table: TuneTable, out: Path) -> Row:
    """The run's settings with the fastest layout, for `weft train`.

    Raises:
        ValueError: no trial ended well.
    """
    winner = table.winner
    if winner is None:
        reasons = "; ".join(f"{row.name}: {row.result.failed if row.result else 'not run'}" for row in table.rows)
        raise ValueError(f"no layout was measured, so there is no config to write: {reasons}")
    out.write_text(config_toml(run_of(config, winner)), encoding="utf-8")
    return winner


def run_of(config: Config, row: Row) -> Config:
    """The run as this row has it.

    Raises:
        ValueError: weft does not run it.
    """
    tree = config.model_dump()
    return make_config({**tree, "layout": row.layout, "train": {**tree["train"], **row.settings}})


def table_file(out: Path) -> Path:
    return out.with_suffix(".json")


def picture_file(out: Path) -> Path:
    return out.with_suffix(".svg")


def trials(out: Path) -> Path:
    return out.with_name(f"{out.stem}-trials")
