"""`weft plan`: what a run will be like, before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Say what a run will be like, before it is started. Needs no GPU.", no_args_is_help=True)


@app.command(epilog="Example: weft plan schedule 1f1b zbv --pp 4 --micro-batches 12")
def schedule(
    names: Annotated[
        list[str] | None, typer.Argument(help="gpipe, 1f1b, interleaved, bfs, zbh1, zbv, dualpipev; or a .csv file.")
    ] = None,
    pp: Annotated[int, typer.Option(help="Processes of the pipeline.", min=2)] = 4,
    vp: Annotated[int, typer.Option(help="Stages of each, of interleaved and bfs.", min=2)] = 2,
    micro_batches: Annotated[int | None, typer.Option(help="In one step; 2·pp by default.", min=1)] = None,
) -> None:
    """Compare pipeline schedules: how long processes wait, and how many micro-batches they hold."""
    from rich.console import Console

    from weft.plan.schedules import named, show_comparison
    from weft.schedules.orders import ORDERS

    rows = [named(name, pp, vp, micro_batches or 2 * pp) for name in names or ORDERS]
    show_comparison(rows, Console())
