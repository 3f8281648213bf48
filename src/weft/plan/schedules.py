"""Pipeline schedules side by side: waiting, and what is held. Torch-free."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from weft.schedules.formula import published_bubble
from weft.schedules.orders import ORDERS, make_schedule
from weft.schedules.sheet import read_sheet
from weft.schedules.table import LOOPED, V_SCHEDULES, Schedule, peaks
from weft.schedules.timeline import Costs, timeline
from weft.units import percent


def named(name: str, pp: int, vp: int, num_micro_batches: int) -> Schedule:
    """A known schedule by its name, or one's own out of a CSV file.

    Raises:
        ValueError: there is none of that name, or it cannot be made so.
    """
    if name.endswith(".csv"):
        return read_sheet(name)
    if name not in ORDERS:
        raise ValueError(f"{name} is no schedule: name one of {', '.join(ORDERS)}, or a .csv file")
    chunks = 2 if name in V_SCHEDULES else vp if name in LOOPED else 1
    return make_schedule(name, pp, chunks, num_micro_batches)


def show_comparison(schedules: list[Schedule], console: Console) -> None:
    table = Table("schedule", "stages", "waiting", "by formula", "micro-batches held", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for schedule in schedules:
        pp, num_stages = len(schedule.orders), schedule.num_stages
        chunks, count = num_stages // pp, schedule.num_micro_batches
        formula = published_bubble(schedule.name, pp, chunks, count, Costs())
        most = max(peaks(schedule)) / chunks
        known = "–" if formula is None else percent(formula)
        table.add_row(schedule.name, str(num_stages), percent(timeline(schedule).bubble), known, f"{most:g}")
    console.print(table)
