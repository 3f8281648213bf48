"""The bar of a verb whose work takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

COUNTED = 100_000
"""Of more than so many things (bytes, mostly), a share says more than two numbers do."""


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each thing that is under way, told as (what, done, of how many); on no terminal, a line as it
    begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[share]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            share = f"{done}/{total}" if total <= COUNTED else f"{100 * done // total} %"
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, share=share)
                if not console.is_terminal:
                    console.print(f"{what} …", markup=False)
            bar.update(tasks[what], completed=done, share=share)

        yield show
