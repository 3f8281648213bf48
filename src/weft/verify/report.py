"""How the findings of a proof are shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.verify.layout import KINDS, LayoutReport


def show_layouts(report: LayoutReport, console: Console, worst: int = 5) -> None:
    """A line for each kind of number that was compared, then the tensors that differ most, then the verdict."""
    a, b = report.layouts
    table = Table(title=f"{a}  against  {b}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("compared", "right"), ("worst", "right"), ("bound", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("what", style="dim", overflow="fold")
    for kind, meaning in KINDS.items():
        found = [difference for difference in report.differences if difference.kind == kind]
        if found:
            top = report.worst(kind)[0]
            right = all(difference.right for difference in found)
            verdict = Text("equal", "green") if right else Text("differs", "bold red")
            table.add_row(kind, str(len(found)), f"{top.error:.1e}", f"{top.bound:.0e}", verdict, meaning)
    console.print(table)
    console.print()
    tensors = Table(title="The tensors that differ most", title_justify="left", title_style="dim", box=None, pad_edge=False)
    for heading, justify in (("gradient of", "left"), ("step", "right"), ("difference", "right"), ("bound", "right")):
        tensors.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for difference in report.worst("gradient", worst):
        style = "" if difference.right else "bold red"
        cells = (difference.name, str(difference.step), f"{difference.error:.1e}", f"{difference.bound:.0e}")
        tensors.add_row(*cells, style=style)
    console.print(tensors)
    console.print()
    if report.right:
        console.print(Text(f"{b} computes what {a} computes.", "bold green"))
    else:
        console.print(Text(f"{b} does not compute what {a} computes. They part ways at {report.first_wrong()}.", "bold red"))
