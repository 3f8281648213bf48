"""Pipeline schedules on the terminal: one as a timeline, several as a table. Torch-free."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.plan.schedules import ScheduleReport
from weft.schedules.terminal import draw, legend
from weft.units import gibibytes, percent


def show_schedule(report: ScheduleReport, console: Console) -> None:
    """The timeline, and for each process what it waits and holds."""
    schedule, colour = report.schedule, console.is_terminal and not console.no_color
    console.print(Text(headline(report), style="bold"), Text(summary(report)), sep="\n")
    console.print()
    for lane in draw(schedule, report.line, console.width, colour):
        console.print(lane, soft_wrap=True)
    console.print()
    console.print(legend(schedule, colour))
    console.print()
    table = Table("process", "stages", "waits", "micro-batches held", box=None)
    if report.activations:
        table.add_column("activations")
    for column in table.columns[2:]:
        column.justify = "right"
    for rank, waiting in enumerate(report.waiting):
        row = [str(rank), _stages(report, rank), percent(waiting), f"{report.held[rank]:.3g}"]
        table.add_row(*row, *([gibibytes(report.activations[rank])] if report.activations else []))
    console.print(table)


def show_comparison(reports: list[ScheduleReport], refused: list[str], console: Console) -> None:
    """One line for each; the fullest process counts."""
    table = Table("schedule", "stages", "waiting", "by formula", "micro-batches held", box=None)
    if with_bytes := any(report.activations for report in reports):
        table.add_column("activations")
    for column in table.columns[1:]:
        column.justify = "right"
    for report in reports:
        formula = "–" if report.published is None else percent(report.published)
        row = [str(report.schedule.num_stages), percent(report.line.bubble), formula, f"{max(report.held):.3g}"]
        table.add_row(
            Path(report.schedule.name).name, *row, *([gibibytes(max(report.activations or [0]))] if with_bytes else [])
        )
    console.print(table)
    for reason in refused:
        console.print(Text(reason, style="dim"))


def headline(report: ScheduleReport) -> str:
    schedule = report.schedule
    stages = f", {schedule.num_stages} stages" if schedule.num_chunks > 1 else ""
    return f"{schedule.name}: {len(schedule.orders)} processes{stages}, {schedule.num_micro_batches} micro-batches"


def summary(report: ScheduleReport) -> str:
    formula = f" (by formula {percent(report.published)})" if report.published is not None else ""
    most = f"at most {max(report.held):.3g} micro-batches are held"
    most += f", {gibibytes(max(report.activations))} of activations" if report.activations else ""
    return f"waiting {percent(report.line.bubble)} of the time{formula}; {most}"


def _stages(report: ScheduleReport, rank: int) -> str:
    stages = report.schedule.stages_of(rank)
    if report.config is None:
        return ", ".join(map(str, stages))
    parts = report.config.layout.stage_blocks(report.config.model)
    return ", ".join(f"{stage} ({len(parts[stage])} blocks)" for stage in stages)
