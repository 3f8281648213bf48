"""`weft profile`: where a step's time and memory go, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from weft.cli.output import Html, writable

if TYPE_CHECKING:
    from rich.console import Console

    from weft.profile.load import Profile


class RunIsEnough(TyperGroup):
    """`weft profile RUN` is `weft profile attach RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["attach", *args])


app = typer.Typer(
    cls=RunIsEnough,
    help="Show where a step's time and memory go, and what to change. Traces come from weft train --profile, or from "
    "weft profile attach.",
    no_args_is_help=True,
)
Where = Annotated[Path, typer.Argument(help="A run, one capture in its profile/, or any folder of Kineto traces.")]


@app.command(epilog="Example: weft profile report runs/small --html profile.html --trace merged.json.gz")
def report(
    path: Where,
    html: Html = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Also: all ranks in one trace, on one clock, for ui.perfetto.dev.", callback=writable),
    ] = None,
) -> None:
    """Break the profiled steps down: kinds of work, messages, layers, operations, memory, ranks; and what to change."""
    from weft.profile.report import show

    console = _console()
    profile = _load(path, console)
    show(profile, console)
    if html is not None:
        from weft.profile.page import draw_page

        html.write_text(draw_page(profile), encoding="utf-8")
        print(f"written: {html}")
    if trace is not None:
        from weft.profile.merge import write_merged

        print(f"written: {trace}; {write_merged(profile, trace)}")


@app.command(epilog="Example: weft profile diff runs/before runs/after")
def diff(before: Where, after: Where) -> None:
    """Compare two profiles: what got slower or larger, and by how much."""
    from weft.profile.diff import show_diff

    console = _console()
    show_diff(_load(before, console), _load(after, console), console)


@app.command(epilog="Example: weft profile attach runs/small --steps 3")
def attach(
    run: Annotated[Path, typer.Argument(help="Folder of a run that is training now, on this or any other machine.")],
    steps: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    ranks: Annotated[
        str | None, typer.Option(help="On which: 0,1,4 or all; by default all of one replica, at most 8.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds after which to give up.", min=1)] = 600,
) -> None:
    """Have a run under way take a trace of its next steps, wait for it, and report.

    The run looks for requests once a step, at no cost; it need not be started again. `weft profile RUN` is the same.
    """
    from weft.profile.attach import request_and_wait
    from weft.profile.report import show

    console = _console()
    folder = request_and_wait(run, steps, ranks, wait, console)
    show(_load(folder, console), console)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)  # a pipe has no width: let no column be cut there


def _load(path: Path, console: Console) -> Profile:
    from rich.markup import escape

    from weft.profile.load import load

    with console.status("reading traces") as status:
        return load(path, lambda name: status.update(f"reading {escape(name)}"))
