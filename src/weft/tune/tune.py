"""Tune: try the layouts that the plan thinks best, one after the other, and keep what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weft.config.load import make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.tune.table import Row, TuneTable
from weft.tune.trial import Result, run_trial, trial_config

Told = Callable[[Row, int, int], None]
"""Told of each trial before it starts: which, its number, of how many."""


def try_all(config: Config, table: TuneTable, steps: int, limit: float, out: Path, told: Told) -> TuneTable:
    """Run every layout of the table that has not been measured. After each, the table is written: what stops this later
    loses one trial at most.

    Args:
        out: the config file to be; the table is beside it, and a folder of the trials.
    """
    waiting = table.waiting
    for number, row in enumerate(waiting, start=1):
        told(row, number, len(waiting))
        table = table.found(row.layout, _try(config, row.layout, steps, limit, trials(out)))
        table.write(table_file(out))
    return table


def _try(config: Config, layout: str, steps: int, limit: float, folder: Path) -> Result:
    try:
        tried = trial_config(config, layout, steps, folder / "tokens")
    except ValueError as error:
        return Result(failed=str(error))
    return run_trial(tried, steps, limit, folder / layout)


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


def trials(out: Path) -> Path:
    return out.with_name(f"{out.stem}-trials")
