"""Two profiles beside each other: what got slower or larger, and by how much. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weft.profile.load import Profile
from weft.profile.memory import memory_of
from weft.profile.report import headline, milliseconds
from weft.profile.summary import by_part
from weft.units import gibibytes, percent

NOISE = 0.005
"""Of a step or of the peak: a smaller difference is not shown."""


class Change(NamedTuple):
    """Seconds or bytes of one thing, before and after."""

    name: str
    before: float
    after: float

    @property
    def more(self) -> float:
        return self.after - self.before


def changes(before: Counter[str], after: Counter[str]) -> list[Change]:
    """Of everything that either has; what differs most comes first."""
    found = [Change(name, before[name], after[name]) for name in {**before, **after}]
    return sorted(found, key=lambda it: (-abs(it.more), it.name))


def compared(before: Profile, after: Profile) -> Iterator[tuple[str, list[Change]]]:
    """Kinds and parts of a mean step, in seconds; holders at the peak, in bytes."""
    yield "kind of work", changes(before.kinds, after.kinds)
    parts = [Counter({it.name: it.seconds for it in by_part(one)}) for one in (before, after)]
    if any(parts):
        yield "part", changes(*parts)
    peaks = [_holders(one) for one in (before, after)]
    if all(peaks):
        known = [{name for rank in one.ranks for name in rank.facts.get("held", ())} for one in (before, after)]
        for name in known[0] ^ known[1]:  # what one of them does not know has not gone, or come
            peaks = [Counter({other: size for other, size in peak.items() if other != name}) for peak in peaks]
        yield "memory at the peak", changes(*peaks)


def _holders(profile: Profile) -> Counter[str]:
    """Of the rank that holds most."""
    found = [memory_of(rank.breakdown.attribution, rank.facts) for rank in profile.ranks]
    known = [memory for memory in found if memory is not None]
    return max(known, key=lambda memory: memory.peak).holders if known else Counter()


def _slowest(before: Profile, after: Profile) -> str:
    """Where ranks are not alike, what the tables are of."""
    means = [sum(one.kinds.values()) for one in (before, after)]
    if all(abs(mean / one.seconds - 1) < NOISE for mean, one in zip(means, (before, after), strict=True)):
        return ""
    told = " and ".join(map(milliseconds, means))
    return f", on the slowest rank; the mean of the ranks, of which times below are: {told}"


def show_diff(before: Profile, after: Profile, console: Console) -> None:
    """Tables of both, and of the difference."""
    for word, profile in (("before", before), ("after", after)):
        console.print(f"[dim]{word}[/] {escape(headline(profile))}", highlight=False)
    if before.config is not None and after.config is not None and before.config.model != after.config.model:
        console.print("[yellow]these are different models[/]")
    step = Change("a step", before.seconds, after.seconds)
    by = percent(abs(step.more) / step.before)
    said = f"is {by} {'slower' if step.more > 0 else 'faster'}" if by != percent(0) else "takes as long as before"
    console.print(
        f"\n[bold]a step {said}[/]: {milliseconds(step.before)} before, {milliseconds(step.after)} after"
        f"{_slowest(before, after)}"
    )
    for name, found in compared(before, after):
        show = gibibytes if name.startswith("memory") else milliseconds
        total = max(sum(it.before for it in found), 1e-12)
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(name)
        for column in ("before", "after", "difference", "of all"):
            table.add_column(column, justify="right", no_wrap=True)
        for it in found:
            if abs(it.more) >= NOISE * total:
                style = "red" if it.more > 0 else "green"
                sign = "+" if it.more > 0 else "-"
                more = Text(f"{sign}{show(abs(it.more))}", style=style)
                table.add_row(it.name, show(it.before), show(it.after), more, f"{100 * it.more / total:+.1f} %")
        console.print()
        console.print(table if table.row_count else f"[dim]{name}: nothing differs by {percent(NOISE)} of it[/]")
