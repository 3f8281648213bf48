"""A schedule drawn as SVG: one lane for each process, time to the right, and under each lane what the process holds."""

from __future__ import annotations

from collections.abc import Iterator

from weft.schedules.table import Op, Schedule, held, peaks
from weft.schedules.timeline import Timeline

INK, SOFT, FAINT, LANE, PAPER = "#1f2430", "#6b7280", "#9aa3b2", "#f1f3f7", "#ffffff"
COLOURS = {"F": ("#2f6db5", "#cfe0f5"), "B": ("#c4553b", "#f6d5cb"), "W": ("#b98a1d", "#f5e6ba")}
"""Of a process's first stage, and of its last; stages between lie between."""
WORDS = {"F": "forward", "B": "backward", "W": "gradients of weights, put off"}
HELD = "#7a869a"

LEFT, RIGHT, TOP, BOTTOM = 92, 78, 84, 50
BAR, GAP, HOLD, SPACE = 30, 3, 18, 15
"""Heights: of an operation, of what is held, and between."""
LEAST, MOST, WIDTH = 18, 40, 960
"""Of an operation that takes least, in pixels; and of the picture, if that allows."""


def draw_svg(schedule: Schedule, line: Timeline, title: str, subtitle: str) -> str:
    """The picture, whole in itself. Numbers in it are micro-batches."""
    unit = min(max((WIDTH - LEFT - RIGHT) / line.length, LEAST / line.briefest), MOST / line.briefest)
    width = max(LEFT + RIGHT + unit * line.length, 640)
    height = TOP + len(schedule.orders) * (BAR + GAP + HOLD + SPACE) + BOTTOM
    font = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
    size = f"viewBox='0 0 {width:.0f} {height}' width='{width:.0f}' height='{height}'"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} {font} role='img'>",
        f"<title>{_escape(f'{title}: {subtitle}')}</title>",
        f"<rect width='{width:.0f}' height='{height}' rx='10' fill='{PAPER}'/>",
        _text(20, 32, title, size=18, weight=600),
        _text(20, 54, subtitle, SOFT, size=13),
        *_lanes(schedule, line, unit),
        *_legend(schedule, height - 20),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lanes(schedule: Schedule, line: Timeline, unit: float) -> Iterator[str]:
    right = LEFT + unit * line.length
    most = peaks(schedule)
    yield _text(right + 12, TOP - 9, "most held", SOFT, size=11)
    for rank, row in enumerate(line.spans):
        y = TOP + rank * (BAR + GAP + HOLD + SPACE)
        yield _text(LEFT - 12, y + BAR / 2 + 4, f"process {rank}", anchor="end", size=13)
        yield f"<rect x='{LEFT}' y='{y}' width='{unit * line.length:.1f}' height='{BAR}' rx='2' fill='{LANE}'/>"
        stages, size = schedule.stages_of(rank), 13 if unit * line.briefest >= 20 else 11
        for op, start, end in row:
            yield from _cell(
                op, stages.index(op.stage), len(stages), LEFT + unit * start, unit * (end - start), y, size
            )
        yield _hill(schedule, rank, line, unit, y + BAR + GAP + HOLD, HOLD / max(most))
        held_most = f"{most[rank] / schedule.num_chunks:.3g}"
        yield _text(right + 12, y + BAR + GAP + HOLD - 4, held_most, HELD, size=13, weight=600)


def _cell(op: Op, chunk: int, num_chunks: int, x: float, width: float, y: float, size: int) -> Iterator[str]:
    dark, light = COLOURS[op.kind]
    share = chunk / max(1, num_chunks - 1)
    place = f"x='{x + 0.6:.1f}' y='{y}' width='{max(0.4, width - 1.2):.1f}' height='{BAR}' rx='2.5'"
    edge = f" stroke='{dark}' stroke-width='1'" if chunk else ""
    yield f"<rect {place} fill='{_mix(dark, light, share)}'{edge}><title>{op}</title></rect>"
    if width >= 0.62 * size * len(str(op.micro_batch)) + 1:
        yield _text(
            x + width / 2, y + BAR / 2 + 4.5, str(op.micro_batch), INK if share > 0.4 else PAPER, "middle", size
        )


def _hill(schedule: Schedule, rank: int, line: Timeline, unit: float, base: float, scale: float) -> str:
    """What a process holds, as an area: it has more from a forward's start, and less from the end of what frees it."""
    now, points = 0, [f"{LEFT:.1f},{base:.1f}"]
    for (op, start, end), after in zip(line.spans[rank], held(schedule, rank), strict=True):
        x = LEFT + unit * (start if op.kind == "F" else end)
        points += [f"{x:.1f},{base - scale * total:.1f}" for total in (now, after.total)]
        now = after.total
    return f"<polygon points='{' '.join(points)}' fill='{HELD}' fill-opacity='0.35'/>"


def _legend(schedule: Schedule, y: float) -> Iterator[str]:
    x = float(LEFT)
    for kind, words in WORDS.items():
        if kind == "W" and not schedule.splits:
            continue
        dark, light = COLOURS[kind]
        for chunk in range(min(2, schedule.num_chunks)):
            fill, edge = (light, f" stroke='{dark}'") if chunk else (dark, "")
            yield f"<rect x='{x:.1f}' y='{y - 11}' width='13' height='13' rx='2.5' fill='{fill}'{edge}/>"
            x += 17
        yield _text(x + 3, y, words, anchor="start", size=12)
        x += 22 + 6.3 * len(words)
    yield f"<rect x='{x:.1f}' y='{y - 11}' width='13' height='13' rx='2' fill='{LANE}' stroke='{FAINT}'/>"
    yield _text(x + 20, y, "waiting", size=12)
    x += 80
    yield f"<path d='M{x:.1f} {y + 1} v-6 h6 v-6 h7 v12 z' fill='{HELD}' fill-opacity='0.5'/>"
    yield _text(x + 20, y, "micro-batches held", size=12)
    if schedule.num_chunks > 1:
        yield _text(x + 150, y, "light: later stages", SOFT, size=12)


def _mix(dark: str, light: str, share: float) -> str:
    pairs = ((int(a[i : i + 2], 16) for a in (dark, light)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _text(
    x: float, y: float, words: str, colour: str = INK, anchor: str = "start", size: float = 14, weight: int = 400
) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {place} font-size='{size:g}' font-weight='{weight}' fill='{colour}'>{_escape(words)}</text>"


def _escape(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;")
