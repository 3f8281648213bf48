"""A profile: the traces of a capture, read and broken down, with what was written beside them. Torch-free."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from weft.config.load import make_config
from weft.config.tree import Config
from weft.profile.attribution import AXES, Attribution
from weft.profile.breakdown import Breakdown, Traffic
from weft.profile.names import PREFIX, WORK
from weft.profile.request import FOLDER, MANIFEST
from weft.profile.trace import Trace, read_trace

TRACES = (".trace.json.gz", ".trace.json", ".json.gz", ".json")


@dataclass(frozen=True)
class Rank:
    """One process of a profile.

    Attributes:
        facts: what its capture wrote down: clock, memory that was held.
    """

    number: int
    file: Path
    trace: Trace
    breakdown: Breakdown
    facts: dict[str, Any]

    @cached_property
    def seconds(self) -> float:
        """Of a step, on average."""
        steps = self.breakdown.steps
        return sum(step.seconds for step in steps) / len(steps)

    @cached_property
    def kinds(self) -> Counter[str]:
        """Seconds of each kind in a step, on average; they add up to `seconds`."""
        return _mean([step.kinds for step in self.breakdown.steps])

    @cached_property
    def parts(self) -> Counter[tuple[str, str, str]]:
        return _mean([step.parts for step in self.breakdown.steps])

    @cached_property
    def traffic(self) -> list[Traffic]:
        return self.breakdown.traffic()

    @property
    def working(self) -> tuple[str, ...]:
        """Kinds in which this process works for itself. On a CPU Python is work too; a GPU only waits for it."""
        return WORK if self.trace.on_gpu else (*WORK, "host")

    @property
    def busy(self) -> float:
        """Seconds of them in a step."""
        return sum(self.kinds[kind] for kind in self.working)

    @property
    def to_wall(self) -> int:
        """ns to add to the trace's own clock for that of the first rank."""
        marks = self.trace.events(f"{PREFIX}clock:")
        base = self.trace.base
        if marks:  # Kineto's clock is checked against the machine's
            offsets = sorted(int(it.name.rpartition(":")[2]) - round(it.start * 1e9) for it in marks)
            base = offsets[len(offsets) // 2]
        return base - int(self.facts.get("clock_ahead_ns", 0))


@dataclass(frozen=True)
class Profile:
    """Traces of some ranks. `about` is empty where they are not weft's."""

    folder: Path
    ranks: tuple[Rank, ...]
    about: dict[str, Any]

    @cached_property
    def config(self) -> Config | None:
        return make_config(self.about["config"]) if "config" in self.about else None

    @property
    def seconds(self) -> float:
        """Of a step: that of the slowest rank."""
        return max(rank.seconds for rank in self.ranks)

    @cached_property
    def kinds(self) -> Counter[str]:
        """Mean over ranks."""
        return _mean([rank.kinds for rank in self.ranks])

    @cached_property
    def parts(self) -> Counter[tuple[str, str, str]]:
        return _mean([rank.parts for rank in self.ranks])

    @property
    def steps(self) -> list[int]:
        return [step.number for step in self.ranks[0].breakdown.steps]

    def mfu(self, *, causal: bool) -> float | None:
        """Model FLOPs of a step over what all devices could do in its time; None where the run is not known."""
        config, peak = self.config, self.about.get("peak_flops")
        if config is None or not peak:
            return None
        flops = config.model.flops_per_token(config.seq, causal=causal) * config.train.global_batch * config.seq
        return flops / (peak * config.layout.world * self.seconds)


def _mean(counters: list[Counter]) -> Counter:
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return Counter({key: value / len(counters) for key, value in total.items()})


def find(path: Path) -> Path:
    """The folder with the traces: a run's newest whole capture, one that is named, or any folder of traces.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        what = f"{path} is a file: name the folder that it lies in" if path.exists() else f"there is no folder {path}"
        raise ValueError(f"{what}; traces are in a run's {FOLDER}/, or in any folder")
    if (path / MANIFEST).exists():
        return path
    for folder in (path / FOLDER, path):
        captures = sorted(file.parent for file in folder.glob(f"step-*/{MANIFEST}"))
        if captures:
            return captures[-1]
    if trace_files(path):
        return path
    raise ValueError(
        f"{path} has no traces: take some with `weft train … --profile 3`, or of a run under way with "
        f"`weft profile attach {path}`"
    )


def trace_files(folder: Path) -> list[Path]:
    """Traces, by rank; files that lie beside them are none."""
    whole = sorted(folder.glob("rank*.trace.json*"), key=_number)
    if whole:
        return whole
    others = [file for file in folder.iterdir() if file.name.endswith(TRACES) and file.name != MANIFEST]
    return sorted(others, key=lambda file: (_number(file), file.name))


def _number(file: Path) -> int:
    found = re.search(r"rank[-_]?(\d+)", file.name)
    return int(found[1]) if found else 0


def load(path: Path, tell: Callable[[str], None] = lambda _: None) -> Profile:
    """Read a profile. `tell` hears the file that is read now.

    Raises:
        ValueError: there are no traces, one is damaged, or one has no whole step.
    """
    folder = find(path)
    about = _read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    axes = _cut_axes(about)
    ranks = []
    for place, file in enumerate(trace_files(folder)):
        tell(file.name)
        trace = read_trace(file)
        facts_file = folder / f"rank{_number(file)}.json"
        facts = _read_json(facts_file) if about and facts_file.exists() else {}
        breakdown = Breakdown(Attribution(trace, about.get("groups", {}), axes[0] if len(axes) == 1 else ""))
        if not breakdown.steps:
            raise ValueError(f"{file} has no whole step: it was taken outside of one, or is empty")
        number = facts.get("rank", trace.distributed.get("rank", _number(file) or place))
        ranks.append(Rank(int(number), file, trace, breakdown, facts))
    return Profile(folder, tuple(sorted(ranks, key=lambda rank: rank.number)), about)


def _cut_axes(about: dict[str, Any]) -> list[str]:
    """Axes inside of the model, along which blocks send messages."""
    layout = about.get("config", {}).get("layout", {})
    return [axis for axis in AXES if axis in ("cp", "tp", "ep") and (layout.get(axis) or 1) > 1]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no table")
    return values
