"""Pictures of a profile, as SVG: a step in time, the roofline, memory over time. Torch-free."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from weft.plan.show.markup import Element, tag
from weft.plan.show.report import large
from weft.profile.breakdown import Step
from weft.profile.load import Profile, Rank
from weft.profile.memory import Memory
from weft.profile.names import PREFIX
from weft.profile.roofline import Device, Operation
from weft.units import gibibytes

COLOURS = {
    "gemm": "#2f6db5", "attention": "#5b4fc0", "norm": "#3f9aa8", "element-wise": "#63a86f", "loss": "#8a7f35",
    "embedding": "#7fae8a", "optimizer": "#2f7d5b", "compiled": "#4a8f5c", "copy": "#8fb3a0", "bubble": "#b3b9c6",
    "data wait": "#d9a441", "checkpoint": "#a07a2e", "evaluation": "#c9b98a", "host": "#8b93a3",
}  # fmt: skip
"""Of each kind; messages that nothing hides have the colours below, axis by axis."""
EXPOSED_COLOURS = {
    "tp": "#c8653d",
    "fsdp": "#d0533f",
    "dp": "#e08a57",
    "cp": "#b2476b",
    "ep": "#d36f93",
    "all": "#e3b09a",
}
OPS = {"F": "#2f6db5", "B": "#c4553b", "W": "#b98a1d"}
WIDTH, LEFT, RIGHT = 1000, 64, 10
BINS = 940


def colour(kind: str) -> str:
    return COLOURS.get(kind) or EXPOSED_COLOURS.get(kind.partition(" ")[0], "#c8653d")


def legend(kinds: Iterable[str]) -> Element:
    marks = [
        tag("span", tag("i", style=f"background:{colour(kind)}"), kind, class_="key") for kind in dict.fromkeys(kinds)
    ]
    return tag("p", *marks, class_="legend")


# -- a step in time ---------------------------------------------------------------------------------------------------


def draw_steps(profile: Profile) -> Element:
    """The last step of every rank, on one clock; where there is a pipeline, its operations under each."""
    steps = [(rank, rank.breakdown.steps[-1]) for rank in profile.ranks]
    first = min(rank.to_wall for rank, _ in steps)
    spans = [(_wall(rank, step.start, first), _wall(rank, step.stop, first)) for rank, step in steps]
    begin, end = min(start for start, _ in spans), max(stop for _, stop in spans)
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    drawn: list[Element] = []
    y = 8.0
    for (rank, step), (start, _) in zip(steps, spans, strict=True):
        drawn.append(tag("text", f"rank {rank.number}", x=LEFT - 8, y=y + 17, text_anchor="end"))
        offset = LEFT + scale * (start - begin)
        for left, right, kind in runs(step):
            drawn.append(
                tag("rect", tag("title", kind), x=round(offset + scale * left, 1), y=y, height=24,
                    width=max(0.3, round(scale * (right - left), 2)), fill=colour(kind))
            )  # fmt: skip
        y += 26
        ops = list(_operations(rank, step, offset, scale, y))
        drawn += ops
        y += 22 if ops else 6
    lines, words = [], []
    for index in range(6):
        x = LEFT + (WIDTH - LEFT - RIGHT) * index / 5
        lines.append(tag("line", x1=x, x2=x, y1=4, y2=y, class_="grid"))
        when, anchor = f"{1000 * (end - begin) * index / 5:.0f} ms", "middle" if index < 5 else "end"
        words.append(tag("text", when, x=x, y=y + 16, text_anchor=anchor))
    title = tag("title", "what every rank did in a step")
    return tag("svg", title, *lines, *drawn, *words, viewBox=f"0 0 {WIDTH} {y + 24:.0f}", role="img", class_="picture")


def _wall(rank: Rank, seconds: float, first: int) -> float:
    return seconds + (rank.to_wall - first) / 1e9


def runs(step: Step) -> Iterator[tuple[float, float, str]]:
    """(from, to, kind) of a step, in seconds from its start, no finer than can be drawn: of each column what has most."""
    width = step.seconds / BINS
    columns: list[dict[str, float]] = [defaultdict(float) for _ in range(BINS)]
    for it in step.slices:
        start, stop = it.start - step.start, it.stop - step.start
        for column in range(int(start / width), min(BINS - 1, int(stop / width)) + 1):
            inside = min(stop, (column + 1) * width) - max(start, column * width)
            if inside > 0:
                columns[column][it.kind] += inside
    kinds = [max(column, key=lambda kind: column[kind]) if column else "host" for column in columns]
    begin = 0
    for column in range(1, BINS + 1):
        if column == BINS or kinds[column] != kinds[begin]:
            yield begin * width, column * width, kinds[begin]
            begin = column


def _operations(rank: Rank, step: Step, offset: float, scale: float, y: float) -> Iterator[Element]:
    """The pipeline's, where a step has several."""
    found = [it for it in rank.trace.events(f"{PREFIX}op:") if step.start <= it.start < step.stop]
    if len(found) < 3:
        return
    for it in found:
        kind, stage, micro_batch = it.name.rpartition("op:")[2].split(":")
        x, width = offset + scale * (it.start - step.start), scale * (it.stop - it.start)
        words = tag("title", f"{kind} of stage {stage}, micro-batch {micro_batch}")
        yield tag("rect", words, x=round(x, 1), y=y, width=max(0.5, width - 0.4), height=15, rx=2, fill=OPS[kind])
        if width > 11:
            yield tag(
                "text", micro_batch, x=x + width / 2, y=y + 11.5, text_anchor="middle", fill="#fff", class_="inside"
            )


# -- roofline ---------------------------------------------------------------------------------------------------------

HEIGHT, BOTTOM, TOP = 320, 40, 14


def draw_roofline(found: Sequence[Operation], device: Device) -> Element | None:
    """Operations that count FLOPs, as dots as large as their time; above them the roof of memory and of arithmetic."""
    dots = [it for it in found if it.flops]
    if not dots:
        return None
    ridge = device.flops / device.bytes
    low_x = math.log10(min(ridge, *(it.intensity for it in dots)) / 2)
    high_x = math.log10(max(ridge, *(it.intensity for it in dots)) * 4)
    high_y = math.log10(device.flops * 2)
    low_y = min(high_y - 2, math.log10(min(it.rate() for it in dots) / 2))

    def x(intensity: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(intensity) - low_x) / (high_x - low_x)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (math.log10(rate) - low_y) / (high_y - low_y)

    start = max(10**low_x, 10**low_y / device.bytes)
    corners = ((start, start * device.bytes), (ridge, device.flops), (10**high_x, device.flops))
    roof = " ".join(f"{x(intensity):.1f},{y(rate):.1f}" for intensity, rate in corners)
    longest = max(it.seconds for it in dots)
    drawn = [tag("polyline", points=roof, class_="frontier")]
    for power in range(math.ceil(low_y), math.floor(high_y) + 1):
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(10.0**power), y2=y(10.0**power), class_="grid"))
        drawn.append(tag("text", large(10.0**power), x=LEFT - 8, y=y(10.0**power) + 4, text_anchor="end"))
    for power in range(math.ceil(low_x), math.floor(high_x) + 1):
        drawn.append(tag("text", f"{10.0**power:g}", x=x(10.0**power), y=HEIGHT - 22, text_anchor="middle"))
    for it in dots:
        words = f"{it.name} {it.dims}: {large(it.rate())}FLOP/s, {100 * it.reached(device):.0f} % of the roof"
        size = 3 + 9 * math.sqrt(it.seconds / longest)
        drawn.append(
            tag(
                "circle",
                tag("title", words),
                cx=x(it.intensity),
                cy=y(it.rate()),
                r=size,
                fill=colour(it.kind),
                class_="dot",
            )
        )
    drawn.append(tag("text", "FLOPs a byte", x=WIDTH - RIGHT, y=HEIGHT - 6, text_anchor="end", class_="note"))
    drawn.append(tag("text", "FLOP/s", x=LEFT + 6, y=TOP + 8, class_="note"))
    title = tag("title", "operations under the device's roof")
    return tag("svg", title, *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="picture")


# -- memory -----------------------------------------------------------------------------------------------------------


def draw_memory(memory: Memory, steps: Sequence[Step]) -> Element:
    """Bytes of tensors over the traced steps; the peak is marked."""
    begin, end = steps[0].start, steps[-1].stop
    top = 1.08 * max(memory.peak, *(size for _, size in memory.curve))

    def x(time: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (min(max(time, begin), end) - begin) / (end - begin)

    def y(size: float) -> float:
        return 220 - 34 - (220 - 34 - TOP) * size / top

    most: dict[int, int] = {}
    for time, size in memory.curve:  # of each column the most
        column = int(x(time))
        most[column] = max(most.get(column, 0), size)
    points = " ".join(f"{column},{y(size):.1f}" for column, size in sorted(most.items()))
    drawn = [
        tag("polygon", points=f"{LEFT},{y(0):.1f} {points} {WIDTH - RIGHT},{y(0):.1f}", class_="hill"),
        tag("circle", cx=x(memory.at), cy=y(memory.peak), r=4, class_="mark"),
        tag(
            "text",
            f"{gibibytes(memory.peak)}, {memory.moment}",
            x=min(x(memory.at) + 8, WIDTH - 230),
            y=y(memory.peak) - 5,
        ),
    ]
    for step in steps:
        drawn.append(tag("line", x1=x(step.start), x2=x(step.start), y1=TOP, y2=y(0), class_="grid"))
        drawn.append(tag("text", f"step {step.number}", x=x(step.start) + 3, y=204))
    for share in (0.5, 1.0):
        drawn.append(
            tag("text", gibibytes(share * memory.peak), x=LEFT - 8, y=y(share * memory.peak) + 4, text_anchor="end")
        )
    title = tag("title", "memory of tensors over time")
    return tag("svg", title, *drawn, viewBox=f"0 0 {WIDTH} 220", role="img", class_="picture")
