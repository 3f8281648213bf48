"""Draws the pictures of schedules.md, each schedule on 4 processes: python docs/make_schedules.py"""

from __future__ import annotations

from pathlib import Path

from weft.plan.schedules import ScheduleReport, named
from weft.plan.show.schedule_view import headline, summary
from weft.schedules.orders import ORDERS
from weft.schedules.picture import draw_svg
from weft.schedules.timeline import Costs

FOLDER = Path(__file__).with_name("schedules")
PROCESSES, CHUNKS, MICRO_BATCHES = 4, 2, 8


def made(path: Path) -> str:
    report = ScheduleReport(named(path.stem, PROCESSES, CHUNKS, MICRO_BATCHES), Costs())
    return draw_svg(report.schedule, report.line, headline(report), summary(report))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in ORDERS:
        picture = FOLDER / f"{name}.svg"
        picture.write_text(made(picture), encoding="utf-8")
