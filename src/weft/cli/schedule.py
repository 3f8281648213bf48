"""`weft plan schedule`: the order of a pipeline's work, drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.output import writable
from weft.cli.shape import SEQ, length

if TYPE_CHECKING:
    from weft.schedules.timeline import Costs

MOST = 2**17
"""Micro-batches, over all processes, of a table: a drawing of more takes minutes, and nobody sees them."""


def schedule(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="gpipe, 1f1b, interleaved, bfs, zbh1, zbv, dualpipev, or a .csv file; all by default."),
    ] = None,
    pp: Annotated[int, typer.Option(help="Processes of the pipeline.", min=2)] = 4,
    vp: Annotated[
        int | None, typer.Option(help="Stages of each, of interleaved and bfs.", min=2, show_default="2")
    ] = None,
    micro_batches: Annotated[int | None, typer.Option(help="In one step; 2·pp by default.", min=1)] = None,
    costs: Annotated[str, typer.Option(help="Time of a stage's forward, backward of input, of weights.")] = "1:1:1",
    model: Annotated[str | None, typer.Option(help="A preset: its stages' own times, and bytes.")] = None,
    layout: Annotated[str | None, typer.Option(help="With a model: the rest of its layout, tp2.bf16.mb2.")] = None,
    seq: Annotated[
        int | None, typer.Option(help="With a model: tokens of a sequence.", min=1, show_default=str(SEQ))
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.", callback=writable)] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write its table into this file, to change and to train with.", callback=writable),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="A line for each, not a drawing.")] = False,
) -> None:
    """Draw a pipeline schedule, or compare several: who waits how long, and what is held.

    A CSV file of your own is checked; what is wrong with it is said.
    """
    from rich.console import Console

    from weft.config.layout import Layout
    from weft.plan.schedules import ScheduleReport, named, of_model
    from weft.plan.show.schedule_view import headline, show_comparison, show_schedule, summary
    from weft.presets import preset_shape
    from weft.schedules.orders import ORDERS
    from weft.schedules.picture import draw_svg
    from weft.schedules.sheet import write_sheet
    from weft.schedules.table import LOOPED

    alone = names is not None and len(names) == 1 and not compare
    if (svg or csv) and not alone:
        raise ValueError("--svg and --csv are for one schedule: name one, and leave --compare out")
    if layout is not None and model is None:
        raise ValueError(f"--layout {layout} is of a model: name one with --model")
    if vp is not None and names and not set(names) & set(LOOPED):
        raise ValueError(f"--vp {vp} is of {' and '.join(LOOPED)}: leave it out, or name one of them")
    given, rest = _costs(costs), Layout.parse(layout or "single")
    tokens = length(seq, preset_shape(model)) if model else SEQ
    count = micro_batches or 2 * pp
    if pp * count > MOST:
        raise ValueError(
            f"--pp {pp} with {count} micro-batches: tables are worked out up to {MOST:,} of one on a process, and this "
            f"has {pp * count:,}; what costs time shows with fewer"
        )
    reports, refused = [], []
    for name in names or ORDERS:
        try:
            table = named(name, pp, vp or 2, count)
            reports.append(of_model(table, model, rest, tokens) if model else ScheduleReport(table, given))
        except ValueError as error:
            if names:
                raise
            refused += [] if str(error) in refused else [str(error)]
    if not reports:
        raise ValueError("; ".join(refused))
    if not alone:
        show_comparison(reports, refused, Console())
        return
    [report] = reports
    show_schedule(report, Console())
    if svg is not None:
        svg.write_text(draw_svg(report.schedule, report.line, headline(report), summary(report)), encoding="utf-8")
    if csv is not None:
        write_sheet(report.schedule, csv)
    for path in (svg, csv):
        if path is not None:
            print(f"written: {path}")


def _costs(text: str) -> Costs:
    """Three numbers, as 1:1:1."""
    from weft.schedules.timeline import Costs

    try:
        forward, backward, weights = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"--costs {text}: write three numbers, forward:input:weights, as 1:1:0.9") from None
    if not all(0 < cost < math.inf for cost in (forward, backward, weights)):
        raise ValueError(f"--costs {text}: every operation takes some time")
    return Costs(forward, backward, weights)
