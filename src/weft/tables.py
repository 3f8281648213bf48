"""Tables on terminals of any width. Torch-free."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

UNBOUND = 1000
"""Columns that no table needs."""
BESIDE = 30
"""Columns that a bar's name and numbers take."""


def print_table(table: Table, console: Console, alone: int = 0) -> None:
    """Print a table with a header so that no cell is cut. Where it is wider than the terminal, one cell of each row, the
    first or that of column `alone`, stands on a line of its own, above the others; and what is wider even so goes on in the
    terminal's next line."""
    if natural_width(table, console) <= console.width:
        console.print(table)
        return
    rest = Table(box=None, pad_edge=False, header_style=table.header_style)
    columns = [*table.columns]
    names = list(columns.pop(alone).cells)
    for column in columns:
        rest.add_column(column.header, justify=column.justify, no_wrap=True)
    for row, *cells in zip(table.rows, *(list(column.cells) for column in columns), strict=True):
        rest.add_row(*(cell.replace("\n", " ") if isinstance(cell, str) else cell for cell in cells), style=row.style)
    width = natural_width(rest, console)
    lines = console.render_lines(rest, console.options.update(width=width), pad=False)
    console.print(Segments([*lines[0], Segment.line()]), crop=False, end="")
    for row, name, line in zip(table.rows, names, lines[1:], strict=True):
        shown = name if isinstance(name, Text) else Text.from_markup(str(name))
        console.print(shown, style=row.style, overflow="fold")
        console.print(Segments([*line, Segment.line()]), crop=False, end="")


def bar_table(title: str = "") -> Table:
    """For rows of a name, two numbers, a bar and words, of which the words alone are folded where there is little room."""
    table = Table(box=None, pad_edge=False, show_header=False, title=title or None, title_justify="left")
    for side in ("left", "right", "right", "left"):
        table.add_column(justify=side, no_wrap=True)
    table.add_column(overflow="fold")
    return table


def bar_room(console: Console, most: int) -> int:
    """Columns of the longest bar, `most` at most: a third of what a terminal has beyond names and numbers."""
    return min(most, max(1, (console.width - BESIDE) // 3))


def natural_width(table: Table, console: Console) -> int:
    """Columns of a table of which no cell is folded."""
    return Measurement.get(console, console.options.update(max_width=UNBOUND), table).maximum
