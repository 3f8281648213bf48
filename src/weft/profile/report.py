"""The report of a profile on a terminal. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weft.plan.show.report import large
from weft.profile.advice import advise
from weft.profile.breakdown import Traffic
from weft.profile.case import Advice
from weft.profile.load import Profile, Rank
from weft.profile.memory import memory_of
from weft.profile.names import WORK
from weft.profile.roofline import device_of, operations
from weft.profile.summary import KIND_WORDS, Layer, by_part, colour, ordered, stragglers
from weft.tables import bar_room, bar_table, print_table
from weft.units import gibibytes, percent, short

MOST_LAYERS = 12
BAR = 34


class Section(NamedTuple):
    title: str
    table: Table


def show(profile: Profile, console: Console) -> None:
    """All of it: where the time goes, messages, layers, operations, memory, ranks, and what to change."""
    console.print(headline(profile), highlight=False, markup=False)
    bar = bar_room(console, BAR)
    sections = (partial(_kinds, room=bar), _traffic, _layers, _operations, partial(_memory, room=bar), _ranks)
    for section in filter(None, (make(profile) for make in sections)):
        console.print(f"\n[bold]{escape(section.title)}[/]", highlight=False)  # a table's own title is cut to its width
        if section.table.show_header:
            print_table(section.table, console)
        else:
            console.print(section.table)
    console.print()
    show_advice(advise(profile), console)


def headline(profile: Profile) -> str:
    steps, about = profile.steps, profile.about
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    traced, there = len(about.get("ranks", ())), len(profile.ranks)
    ranks = f"{there} of {traced} traced ranks" if there < traced else f"{there} rank{'s' * (there > 1)}"
    line = f"{profile.folder}: {span} on {ranks}"
    config = profile.config
    if config is not None:
        tokens = config.train.global_batch * config.seq
        line = f"{line}, {about['layout']} on {config.layout.world} × {about['device']}"
        line += f"\na step takes {milliseconds(profile.seconds)}: {short(tokens / profile.seconds)} tokens/s"
        full, causal = profile.mfu(causal=False), profile.mfu(causal=True)
        if full is not None and causal is not None:
            line += f", MFU {percent(full)} ({percent(causal)} causal) of {large(about['peak_flops'])}FLOP/s a device, "
            line += str(about.get("peak_source"))
        return line
    return f"{line}\na step takes {milliseconds(profile.seconds)}"


def milliseconds(seconds: float) -> str:
    """Of a part of a step: 0.31 ms, 12.5 ms, 1,240 ms."""
    value = 1000 * seconds
    return f"{value:,.0f} ms" if value >= 99.95 else f"{value:.1f} ms" if value >= 9.995 else f"{value:.2f} ms"


def _kinds(profile: Profile, room: int) -> Section:
    kinds, total = profile.kinds, sum(profile.kinds.values())
    table = bar_table()
    start = 0.0
    for kind, seconds in ordered(kinds):
        indent, width = int(room * start / total), max(1, round(room * seconds / total))
        bar = Text(" " * min(indent, room - 1) + "█" * width, style=colour(kind))
        what = KIND_WORDS.get(kind, "messages that nothing hides" if kind not in WORK else "")
        table.add_row(kind, milliseconds(seconds), percent(seconds / total), bar, f"[dim]{what}[/]")
        start += seconds
    table.add_row("[bold]a step[/]", f"[bold]{milliseconds(total)}[/]", "", "", "")
    return Section("where a step's time goes, mean of the ranks", table)


def _traffic(profile: Profile) -> Section | None:
    if not any(rank.traffic for rank in profile.ranks):
        return None
    table = _table("axis", "message", ">count", ">sent", ">under way", ">exposed", ">hidden", ">rate", ">rank")
    for axis, rank in most_exposed(profile).items():
        for it in (it for it in rank.traffic if it.axis == axis):
            table.add_row(
                it.axis, it.kind, f"{it.count:g}", sent(it), milliseconds(it.seconds), milliseconds(it.exposed),
                percent(it.overlapped / max(it.seconds, 1e-12)), speed(it), str(rank.number),
            )  # fmt: skip
    return Section("messages of a step by axis, on the rank where its are exposed most", table)


def most_exposed(profile: Profile) -> dict[str, Rank]:
    """Axis → the rank that stands still longest for its messages; the axis with most of that first."""
    found: dict[str, tuple[float, Rank]] = {}
    for rank in profile.ranks:
        for axis in {it.axis for it in rank.traffic}:
            seconds = sum(it.exposed for it in rank.traffic if it.axis == axis)
            if axis not in found or seconds > found[axis][0]:
                found[axis] = (seconds, rank)
    return {axis: found[axis][1] for axis in sorted(found, key=lambda axis: -found[axis][0])}


def sent(it: Traffic) -> str:
    return gibibytes(it.bytes) if it.bytes else "–"  # older traces do not tell


def speed(it: Traffic) -> str:
    return f"{large(it.bytes / max(it.seconds, 1e-12))}B/s" if it.bytes else "–"


def _layers(profile: Profile) -> Section | None:
    layers = by_part(profile)
    if not layers:
        return None
    names = ("forward", "backward", "again", "attention", "mlp", "norms", "messages", "all", "")
    table = _table("part", *(f">{name}" for name in names))
    total = sum(layer.seconds for layer in layers)
    for layer in _shown(layers):
        if isinstance(layer, str):
            table.add_row(f"[dim]{layer}[/]")
            continue
        cells = (layer.forward, layer.backward, layer.again, layer.attention, layer.mlp, layer.norms, layer.messages)
        table.add_row(
            layer.name, *(milliseconds(it) if it else "[dim]–[/]" for it in cells), milliseconds(layer.seconds),
            percent(layer.seconds / total),
        )  # fmt: skip
    return Section("by part of the model, mean of the ranks", table)


def _shown(layers: Sequence[Layer]) -> list[Layer | str]:
    """All of a few blocks; of many the first, the slowest and the last."""
    blocks = [layer for layer in layers if layer.is_block]
    if len(blocks) <= MOST_LAYERS:
        return list(layers)
    slowest = sorted(blocks[1:-1], key=lambda layer: -layer.seconds)[: MOST_LAYERS - 4]
    kept = {blocks[0].name, blocks[-1].name, *(layer.name for layer in slowest)}
    rest = [layer for layer in blocks if layer.name not in kept]
    mean = milliseconds(sum(layer.seconds for layer in rest) / len(rest))
    found: list[Layer | str] = [layer for layer in layers if not layer.is_block or layer.name in kept]
    found.insert(found.index(blocks[-1]) + 1, f"{len(rest)} other blocks, {mean} each")
    return found


def _operations(profile: Profile) -> Section | None:
    found, device = operations(slowest_rank(profile).breakdown), device_of(profile)
    if not found:
        return None
    title = "largest operations"
    if device is not None:
        title += f", against {device.name}: {large(device.flops)}FLOP/s, {large(device.bytes)}B/s ({device.source})"
    table = _table("operation", "tensors", ">count", ">time", ">FLOP/s", ">FLOPs a byte", "bound by", ">of the roof")
    for it in found[:10]:
        roof = (it.bound(device), percent(it.reached(device))) if device and it.bytes else ("", "")
        rate, intensity = (large(it.rate()), f"{it.intensity:.1f}") if it.flops else ("", "")
        table.add_row(it.name, it.dims, f"{it.count:g}", milliseconds(it.seconds), rate, intensity, *roof)
    return Section(title, table)


def slowest_rank(profile: Profile) -> Rank:
    """The one that works longest."""
    return max(profile.ranks, key=lambda rank: rank.busy)


def _memory(profile: Profile, room: int) -> Section | None:
    memories = [(rank, memory_of(rank.breakdown.attribution, rank.facts)) for rank in profile.ranks]
    known = [(rank, memory) for rank, memory in memories if memory is not None]
    if not known:
        return None
    rank, memory = max(known, key=lambda pair: pair[1].peak)
    title = f"memory of tensors, rank {rank.number}: at most {gibibytes(memory.peak)}, in the {memory.moment}"
    table = bar_table()
    for what, size in memory.holders.most_common():
        if size >= 0.0005 * memory.peak:
            bar = Text("█" * max(1, round(room * size / memory.peak)), style="cyan")
            table.add_row(what, gibibytes(size), percent(size / memory.peak), bar)
    return Section(title, table)


def _ranks(profile: Profile) -> Section | None:
    if len(profile.ranks) == 1:
        return None
    slow = stragglers(profile)
    table = _table(">rank", ">a step", ">works", ">host", ">messages", ">bubble", ">data wait", "")
    for rank in profile.ranks:
        kinds = rank.kinds
        work = sum(kinds[kind] for kind in WORK)
        messages = sum(seconds for kind, seconds in kinds.items() if kind.endswith("exposed"))
        cells = (rank.seconds, work, kinds["host"], messages, kinds["bubble"], kinds["data wait"])
        word = Text(slow.get(rank.number, ""), style="red")
        table.add_row(str(rank.number), *map(milliseconds, cells), word)
    return Section("ranks side by side", table)


def show_advice(found: Sequence[Advice], console: Console) -> None:
    if not found:
        console.print("Nothing stands out that a setting would change.")
        return
    console.print("[bold]what to change, largest gain first[/]")
    for place, it in enumerate(found, start=1):
        console.print(
            f"{place}. [bold]{escape(it.change)}[/]: {it.gain}\n   [dim]{escape(it.evidence)}[/]", highlight=False
        )


def _table(*columns: str) -> Table:
    """`>name`: numbers, to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table
