"""What was seen of a process, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from weft.exact.rank import Exact
from weft.plan.memory.moments import TENSORS
from weft.plan.show.report import large
from weft.units import gibibytes, percent

WORK = {
    "matmul": "matrix products of the model",
    "attention_causal": "attention, without what the mask hides",
    "attention": "attention, with it",
    "again": "worked out again",
}


def title(exact: Exact) -> str:
    layout = exact.config.layout
    stage = f", stage {exact.stage} of {layout.pp}" if layout.pp > 1 else ""
    return f"{layout}: rank {exact.rank} of {layout.world:,}{stage}, one step"


def show(exact: Exact, console: Console) -> None:
    """Memory, messages, work."""
    console.print(f"\n[bold]{title(exact)}[/]", highlight=False)
    held = f"{exact.parameters:,} parameters" + (f", {exact.buffers:,} numbers beside them" if exact.buffers else "")
    console.print(f"{held}; fullest in: {exact.ledger.peak_moment}", highlight=False)
    counted = f"memory, as on a {'GPU' if exact.device == 'cuda' else 'CPU'}"
    console.print(_table(counted, ("", "exact", "planned"), memory_rows(exact)))
    console.print(_table("whose it is", ("module", "kind", "memory"), module_rows(exact, 10), left=2))
    rows = list(message_rows(exact))
    if rows:
        console.print(_table("messages", ("kind", "axis", "processes", "count", "bytes", "sent"), rows, left=2))
    console.print(_table("work", ("", "FLOPs"), work_rows(exact)))


def memory_rows(exact: Exact) -> Iterator[Sequence[str]]:
    """Of each kind at the exact peak, and at the planned one; then both peaks."""
    found, plan = exact.at_peak(), exact.plan
    for kind in TENSORS:
        planned = getattr(plan, kind)
        if found[kind] or planned:
            yield kind, gibibytes(found[kind]), gibibytes(planned)
    yield (
        "all",
        gibibytes(exact.ledger.peak),
        f"{gibibytes(plan.tensors)} ({round(plan.tensors / exact.ledger.peak - 1, 3) + 0.0:+.1%})",
    )


def module_rows(exact: Exact, count: int) -> Iterator[Sequence[str]]:
    """The modules that hold most at the peak; equal ones of all blocks together."""
    found = exact.by_module().most_common()
    for (module, kind), size in found[:count]:
        yield module or "–", kind, gibibytes(size)
    if rest := sum(size for _, size in found[count:]):
        yield "others", "", gibibytes(rest)


def message_rows(exact: Exact) -> Iterator[Sequence[str]]:
    for line in sorted(exact.messages, key=lambda line: (line.axis, -line.bytes)):
        yield line.kind, line.axis, f"{line.size:,}", f"{line.count:,}", gibibytes(line.bytes), gibibytes(line.wire)


def work_rows(exact: Exact) -> Iterator[Sequence[str]]:
    for name, words in WORK.items():
        if exact.flops.get(name):
            yield words, large(exact.flops[name])
    model = exact.flops.get("matmul", 0) + exact.flops.get("attention_causal", 0)
    share = exact.formula_flops(causal=True)
    yield "of the model, over an even share of the formula's", percent(model / share)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold cyan"
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
