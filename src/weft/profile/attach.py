"""Attach: have a run under way take a trace, and wait for it. Torch-free."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from weft.config.load import load_config
from weft.config.tree import Config
from weft.lock import alone
from weft.profile.request import FILE, FOLDER, MANIFEST, Request, parse_ranks

LOOK_EVERY = 0.2
"""Seconds."""


def request_and_wait(run: Path, steps: int, ranks: str | None, limit: float, console: Console) -> Path:
    """The folder of the new capture.

    Raises:
        ValueError: nobody trains there, a request waits already, or no trace came in time.
    """
    layout = _config(run).layout
    if not training(run):
        raise ValueError(f"nobody is training in {run} now: start with weft train … --profile {steps}")
    if Request.waiting(run):
        raise ValueError(f"{run} was asked for a trace already, and has not begun it: wait, or remove {FOLDER}/{FILE}")
    before = captures(run)
    Request(0, steps, parse_ranks(ranks, layout)).write(run)
    end = time.monotonic() + limit
    with console.status("asked: the run looks for requests once a step") as status:
        while not (new := captures(run) - before):
            if not training(run):
                raise ValueError(f"the training in {run} ended before its trace was whole")
            if time.monotonic() > end:
                (run / FOLDER / FILE).unlink(missing_ok=True)
                raise ValueError(f"no trace came within {limit:g} s: see {run}/logs, or wait longer with --wait")
            state = "asked" if Request.waiting(run) else "being taken"
            status.update(f"{state}; the run's last step is {_last_step(run)}")
            time.sleep(LOOK_EVERY)
    return new.pop()


def captures(run: Path) -> set[Path]:
    """Folders of whole ones."""
    return {file.parent for file in (run / FOLDER).glob(f"step-*/{MANIFEST}")}


def training(run: Path) -> bool:
    """Whether a job holds the run's folder."""
    try:
        with alone(run, "busy"):
            return False
    except ValueError:
        return True


def _config(run: Path) -> Config:
    file = run / "config.toml"
    if not file.exists():
        raise ValueError(f"{run} is no run: there is no {file.name} in it")
    return load_config([file])


def _last_step(run: Path) -> str:
    """Of the log; it may be logged seldom."""
    try:
        last = (run / "log.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
        return f"{json.loads(last)['step']:,}"
    except (OSError, json.JSONDecodeError, KeyError):
        return "not logged yet"
