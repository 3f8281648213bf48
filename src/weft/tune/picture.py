"""Trials drawn: what was predicted of each against what was measured, as SVG. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from weft.plan.show.markup import Element, tag
from weft.tune.table import Row, TuneTable, mean_error
from weft.units import duration

INK, SOFT, LINE, PAPER, MAIN, BEST = "#1f2430", "#6b7280", "#e1e5ec", "#ffffff", "#2f6db5", "#c4553b"
LEFT, TOP, SIDE, RIGHT, BOTTOM = 84, 84, 400, 430, 56
"""Margins around a square, and its side; on the right is room for the names."""
NEAR = 1.15
"""The band on both sides of the diagonal."""
LISTED = 22
"""Names that have room."""


def draw_trials(table: TuneTable) -> str:
    """The picture, whole in itself. A ring is what the plan said, a dot what was expected after the trials before."""
    rows = sorted(table.measured, key=lambda row: row.seconds or 0.0)
    assert rows, "there is something to draw once something was measured"
    axis = Axis([time for row in rows for time in _times(row)])
    height = max(TOP + SIDE + BOTTOM, TOP + 18 * min(len(rows), LISTED + 1) + 20)
    width = LEFT + SIDE + RIGHT
    return (
        ElementTree.tostring(
            tag(
                "svg",
                tag("title", "predicted against measured time of a step, of each layout that was tried"),
                tag("rect", width=width, height=height, rx=10, fill=PAPER),
                label(20, 32, "predicted against measured time of a step", size=17, weight=600),
                label(20, 54, _told(rows), SOFT, size=13),
                *frame(axis),
                *(element for number, row in enumerate(rows, 1) for element in _trial(axis, number, row, table.winner)),
                *_names(rows, table.winner),
                xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height,
                role="img", font_family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
            ),
            encoding="unicode",
        )
        + "\n"
    )  # fmt: skip


class Axis:
    """Both axes: seconds, by their logarithm, over all that is drawn."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.low, self.high = min(seconds) / NEAR, max(seconds) * NEAR

    def share(self, seconds: float) -> float:
        return math.log(seconds / self.low) / math.log(self.high / self.low)

    def x(self, seconds: float) -> float:
        return LEFT + SIDE * self.share(seconds)

    def y(self, seconds: float) -> float:
        return TOP + SIDE * (1 - self.share(seconds))

    def ticks(self) -> list[float]:
        """Round times, not more than are read."""
        power = math.floor(math.log10(self.low))
        for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            decades = range(power, math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**ten for ten in decades for step in steps]
            found = [seconds for seconds in found if self.low <= seconds <= self.high]
            if len(found) <= 8:
                break
        return found


def _told(rows: Sequence[Row]) -> str:
    planned, expected = mean_error(row.error for row in rows), mean_error(row.surprise for row in rows)
    return f"mean error of the plan (rings) {planned:.0%}; of the plan and the trials before (dots) {expected:.0%}"


def frame(axis: Axis) -> Iterator[Element]:
    low, high = axis.low, axis.high
    corners = [(low, low), (low, low * NEAR), (high / NEAR, high), (high, high), (high, high / NEAR), (low * NEAR, low)]
    band = " ".join(f"{axis.x(x):.1f},{axis.y(y):.1f}" for x, y in corners)
    yield tag("rect", x=LEFT, y=TOP, width=SIDE, height=SIDE, fill="none", stroke=LINE)
    yield tag("polygon", tag("title", f"within {NEAR - 1:.0%}"), points=band, fill=MAIN, fill_opacity="0.07")
    for seconds in axis.ticks():
        x, y = axis.x(seconds), axis.y(seconds)
        yield tag("line", x1=x, x2=x, y1=TOP, y2=TOP + SIDE, stroke=LINE)
        yield tag("line", x1=LEFT, x2=LEFT + SIDE, y1=y, y2=y, stroke=LINE)
        yield label(x, TOP + SIDE + 18, duration(seconds), SOFT, size=11, anchor="middle")
        yield label(LEFT - 8, y + 4, duration(seconds), SOFT, size=11, anchor="end")
    yield tag("line", x1=LEFT, x2=LEFT + SIDE, y1=TOP + SIDE, y2=TOP, stroke=SOFT, stroke_dasharray="4 4")
    yield label(LEFT + SIDE / 2, TOP + SIDE + 40, "measured", SOFT, size=12, anchor="middle")
    yield label(LEFT - 8, TOP - 10, "predicted", SOFT, size=12, anchor="end")


def _trial(axis: Axis, number: int, row: Row, winner: Row | None) -> Iterator[Element]:
    measured, planned, expected = _times(row)
    x, colour = axis.x(measured), BEST if row is winner else MAIN
    words = tag("title", f"{row.name}: {duration(measured)}, planned {duration(planned)}, then {duration(expected)}")
    yield tag("line", x1=x, x2=x, y1=axis.y(planned), y2=axis.y(expected), stroke=colour, stroke_opacity="0.35")
    yield tag("circle", cx=x, cy=axis.y(planned), r=4, fill=PAPER, stroke=colour, stroke_width="1.5")
    yield tag("circle", words, cx=x, cy=axis.y(expected), r=4.5, fill=colour)
    yield label(x + 7, axis.y(expected) + 4, str(number), colour, size=11)


def _names(rows: Sequence[Row], winner: Row | None) -> Iterator[Element]:
    """Numbers of the dots, fastest first."""
    x = LEFT + SIDE + 28
    for number, row in enumerate(rows[:LISTED], 1):
        name, y = row.name if len(row.name) <= 44 else f"{row.name[:43]}…", TOP + 18 * number - 6
        colour = BEST if row is winner else INK
        yield label(x + 14, y, str(number), SOFT, size=12, anchor="end")
        yield label(x + 22, y, name, colour, size=12, weight=600 if row is winner else 400)
        yield label(LEFT + SIDE + RIGHT - 16, y, duration(row.seconds or 0.0), colour, size=12, anchor="end")
    if len(rows) > LISTED:
        yield label(x + 22, TOP + 18 * (LISTED + 1) - 6, f"and {len(rows) - LISTED} slower ones", SOFT, size=12)


def _times(row: Row) -> tuple[float, float, float]:
    assert row.seconds is not None
    return row.seconds, row.predicted_seconds, row.expected_seconds


def label(
    x: float, y: float, words: str, colour: str = INK, size: int = 14, weight: int = 400, anchor: str = "start"
) -> Element:
    return tag("text", words, x=x, y=y, fill=colour, font_size=size, font_weight=weight, text_anchor=anchor)
