"""What a search found, on a terminal: the best layouts, why others lost, one plan part by part. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weft.plan.advice import Answer, tightly
from weft.plan.grid import row_of
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import Search
from weft.plan.show.waterfall import Part, memory_parts, slower, time_parts, why_slower
from weft.plan.time.constants import CONSTANTS
from weft.tables import bar_room, bar_table, print_table
from weft.units import duration, gibibytes, percent, short

BAR = 40
"""Columns of a whole."""


def show_search(found: Search, plans: Sequence[Plan], console: Console) -> None:
    """The best layouts as a table, then why the others lost."""
    cluster = found.cluster
    console.print(
        f"[bold]{cluster.gpus:,} × {escape(cluster.title)}[/]: {counted(found)}. {asked(found.job)}{_use_of_experts(found)}"
    )
    if plans:
        print_table(_ranking(plans, cluster.unit), console)
        rivals = found.rivals()
        if rivals:
            console.print("[italic]why not …[/]")
            print_table(_rivals(rivals, plans[0]), console, alone=3)
    else:
        console.print(Text(refusal(found), "red"))
    if plans and (tight := found.tight(plans[0])):
        line = f"Faster, but so tight that it may run out of memory: {tight.layout}, {duration(tight.seconds)} "
        console.print(line + f"({slower(tight, plans[0])}), {memory_of(tight)}.", highlight=False)
    if near := found.nearest():
        short_of, change, words = near
        need = short_of.bytes - CONSTANTS.usable * cluster.memory
        line = f"{'Fastest' if len(found.order) else 'Smallest'} that does not fit: {short_of.layout}, "
        line += f"{duration(short_of.seconds)}, "
        line += f"{gibibytes(short_of.bytes)} a {cluster.unit}: {gibibytes(max(need, 0))} too much."
        if change is not None:
            line += f" {_change(change, words)}"
        console.print(line, highlight=False)


def counted(found: Search) -> str:
    """How many layouts there are, and how many fit."""
    sure = int(np.count_nonzero(found.sure))
    tight = len(found.order) - sure
    return f"{len(found):,} layouts, {sure:,} fit" + (f", {tight:,} more tightly" if tight else "")


def memory_of(plan: Plan) -> str:
    """What it takes, of what there is; where that may not be enough, how much of it can be used."""
    told = f"{gibibytes(plan.bytes)} ± {percent(plan.memory.spread)} of {gibibytes(plan.cluster.memory)}"
    return told if plan.sure else f"{told} ({gibibytes(CONSTANTS.usable * plan.cluster.memory)} can be used)"


def left(plan: Plan) -> str:
    return gibibytes(plan.headroom) + ("" if plan.sure else ", tight")


def asked(job: Job) -> str:
    """What a plan is a plan of, in words."""
    sequences = "1 sequence" if job.global_batch == 1 else f"{job.global_batch:,} sequences"
    return f"{sequences} of {job.seq:,} tokens a step, {short(job.tokens)} tokens in all"


def _use_of_experts(found: Search) -> str:
    if found.shape.experts is None:
        return ""
    busiest = found.job.busiest_expert
    return f"; the busiest expert is given {busiest:g} times its share" if busiest > 1 else "; experts are used evenly"


def show_closest(plan: Plan, found: Search, console: Console) -> None:
    """What to change of a plan that does not fit, as little as that takes."""
    near = found.closest(row_of(plan.layout, plan.shape, plan.job))
    if near is None:
        console.print("[red]No layout of this model fits this cluster.[/]")
        return
    change, words = near
    if plan.layout.precision != change.layout.precision:
        words = [*words, f"precision {plan.layout.precision} → {change.layout.precision}"]
    console.print(_change(change, words), highlight=False)


def refusal(found: Search) -> str:
    """Why there is nothing to rank: of those that fit, weft does not run the fastest, nor others."""
    if not len(found):
        there = f"{found.cluster.gpus:,} {found.cluster.units}"
        return f"no layout: {there} and a batch of {found.job.global_batch:,} cannot be cut so"
    if not len(found.order):
        return "no layout fits"
    try:
        found.layout(int(found.order[0]))
    except ValueError as error:
        return f"no layout that fits is one that weft runs: {error}"
    return ""


def _change(plan: Plan, words: Sequence[str]) -> str:
    return f"Nearest that fits: {', '.join(words)}: {plan.layout}, {duration(plan.seconds)}{tightly(plan)}."


def _ranking(plans: Iterable[Plan], unit: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layout", overflow="fold")
    for name in ("step", "tokens/s", "MFU causal", "full", "days", f"{unit}-hours", "memory", "left", "bound by"):
        table.add_column(name, justify="left" if name == "bound by" else "right", no_wrap=True)
    for plan in plans:
        table.add_row(
            str(plan.layout), duration(plan.seconds), short(plan.tokens_per_s), percent(plan.mfu(causal=True)),
            percent(plan.mfu(causal=False)), f"{plan.days:,.1f}", short(plan.gpu_hours), gibibytes(plan.bytes),
            left(plan), plan.bound,
        )  # fmt: skip
    return table


def _rivals(rivals: Iterable[tuple[str, Plan]], winner: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, side in (("with", "left"), ("slower", "right"), ("mostly", "left"), ("layout", "left")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for word, plan in rivals:
        table.add_row(word, slower(plan, winner), why_slower(plan, winner), str(plan.layout))
    return table


def show_plan(plan: Plan, console: Console) -> None:
    """One plan part by part: memory against what a GPU has, time of a step."""
    color = "green" if plan.sure else "yellow" if plan.fits else "red"
    verdict, memory = f"[{color}]{plan.verdict}[/]", memory_of(plan)
    if plan.memory.host:
        memory += f" and {gibibytes(plan.memory.host)} of its CPU's {gibibytes(plan.cluster.host_memory_gib * 2**30)}"
    console.print(
        f"\n[bold]{plan.layout}[/] {verdict}: {memory}, {duration(plan.seconds)} ± {percent(plan.time.spread)} a step, "
        f"bound by {plan.bound}"
    )
    room = bar_room(console, BAR)
    console.print(_bars(f"memory of the fullest {plan.cluster.unit}", memory_parts(plan), gibibytes, room))
    console.print(_bars("time of a step", time_parts(plan), duration, room))


def _bars(title: str, parts: Sequence[Part], unit, room: int) -> Table:  # type: ignore[no-untyped-def]
    total = sum(part.size for part in parts)
    table = bar_table(title)
    for part in parts:
        start, width = int(room * part.start / total), max(1, round(room * part.size / total))
        bar = Text(" " * min(start, room - 1) + "█" * width, style="cyan")
        table.add_row(part.name, unit(part.size), percent(part.size / total), bar, f"[dim]{part.what}[/]")
    return table


def show_answers(answers: Iterable[Answer], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, title="what if", title_justify="left")
    for _ in range(3):
        table.add_column(overflow="fold")
    for question, answer, layout in answers:
        table.add_row(question, answer, str(layout or ""))
    console.print(table)
