"""Scores as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weft.prompt.compare import Price, against
from weft.prompt.perplexity import Perplexity
from weft.prompt.score import Scored
from weft.prompt.search import Search
from weft.prompt.task import Measure
from weft.tables import print_table
from weft.units import duration, short

SHOWN = 10
"""Candidates of a search that are shown."""


def show_compared(scored: Sequence[Scored], price: Price, console: Console) -> None:
    """A line for each prompt; differences are against the first, on the same rows."""
    print_table(compared_table(scored, price), console)
    sure = [it for it in scored[1:] if against(scored[0], it)[1] > 0 or against(scored[0], it)[2] < 0]
    if len(scored) > 1 and not sure:
        console.print(
            f"{len(scored[0].right)} rows do not tell these prompts apart: every interval of a difference has 0 in it"
        )


def compared_table(scored: Sequence[Scored], price: Price) -> Table:
    table = Table(box=None, pad_edge=False)
    for head, side in (
        ("prompt", "left"), ("right", "right"), ("95 %", "left"), ("against the first", "right"), ("95 %", "left"),
        ("malformed", "right"), ("cut", "right"), ("tokens in", "right"), ("out", "right"), ("time", "right"),
    ):  # fmt: skip
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    if price != Price():
        table.add_column("price", justify="right")
    for one in scored:
        low, high = one.interval
        difference, least, most = against(scored[0], one)
        first = one is scored[0]
        cells = [
            escape(one.prompt.id), f"{100 * one.accuracy:.1f} %", f"{100 * low:.1f} … {100 * high:.1f}",
            "" if first else f"{100 * difference:+.1f}", "" if first else f"{100 * least:+.1f} … {100 * most:+.1f}",
            str(sum(it.malformed for it in one.answers)), str(sum(it.reply.cut for it in one.answers)),
            short(one.prompt_tokens), short(one.new_tokens), duration(one.seconds),
        ]  # fmt: skip
        table.add_row(*cells, *([f"{price.of(one):.4g}"] if price != Price() else []))
    return table


def show_search(found: Search, price: Price, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for head, side in (
        ("candidate", "left"),
        ("right", "right"),
        ("rows", "right"),
        ("examples", "right"),
        ("instruction", "left"),
    ):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    for one in found.candidates[:SHOWN]:
        text = " ".join(one.prompt.instruction.split())
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        examples = str(len(one.prompt.examples))
        table.add_row(escape(one.prompt.id), f"{100 * one.accuracy:.1f} %", str(one.rows), examples, escape(shown))
    console.print(table)
    if len(found.candidates) > SHOWN:
        console.print(f"… and {len(found.candidates) - SHOWN} more")
    console.print(f"\n{found.asked} questions asked. On {len(found.base.right)} rows that had no part in the choice:")
    if found.best is found.base:
        print_table(compared_table([found.base], price), console)
        console.print("none was better than the prompt that was given")
        return
    print_table(compared_table([found.base, found.best], price), console)
    if found.gain[1] <= 0:
        console.print("the interval of the difference has 0 in it: more rows would tell whether this is better")


def show_measures(measures: Sequence[Measure], texts: Sequence[Perplexity], console: Console) -> None:
    """Every figure ± its standard error."""
    table = Table(box=None, pad_edge=False)
    for head, side in (("", "left"), ("", "left"), ("value", "right"), ("± 1 s.e.", "left"), ("of", "right")):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    for text in texts:
        name, count = escape(text.text), f"{text.tokens:,} tokens"
        table.add_row(name, "perplexity", f"{text.perplexity:.4g}", error(text.perplexity_error), count)
        table.add_row(
            "", "nats a token", f"{text.nats:.4f}", error(text.error), f"windows of {text.window}, {text.stride} apart"
        )
        if not math.isnan(text.bits_per_byte):
            table.add_row(
                "", "bits a byte", f"{text.bits_per_byte:.4f}", error(text.error / text.nats * text.bits_per_byte), ""
            )
    for one in measures:
        table.add_row(escape(one.what), one.metric, f"{one.value:.4f}", error(one.error), f"{one.count:,} {one.unit}")
    console.print(table)


def error(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"
