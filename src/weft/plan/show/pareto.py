"""Memory against time of every layout that a search has looked at, as SVG. Torch-free."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from weft.config.layout import Layout
from weft.plan.search import Search
from weft.plan.show.markup import Element, tag
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.work import Num
from weft.units import duration, gibibytes

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 66, 16, 24, 48
CELL = 4
"""Pixels of a dot: layouts that fall on one dot are drawn once, and the fastest of them is told."""
SLOWEST, FULLEST = 4.0, 1.6
"""Of what is drawn, in the best layout's time and in the GPU's memory."""


class Point(NamedTuple):
    x: float
    y: float
    layout: Layout
    seconds: float
    bytes: float

    @property
    def words(self) -> str:
        return f"{self.layout}: {duration(self.seconds)}, {gibibytes(self.bytes)}"


class Pareto:
    """The picture and what it shows."""

    def __init__(self, found: Search) -> None:
        seconds, memory = np.asarray(found.told), found.cluster.memory
        self.found, self.unit = found, found.cluster.unit
        self.best = float((seconds[found.fastest] if len(found.fastest) else seconds).min(initial=np.inf))
        shown = np.flatnonzero(
            np.isfinite(seconds) & (seconds <= SLOWEST * self.best) & (found.bytes <= FULLEST * memory)
        )
        self.rows = shown[np.argsort(seconds[shown], kind="stable")]
        self.top = float(seconds[self.rows].max(initial=self.best)) * 1.05
        self.wide = min(FULLEST * memory, 1.05 * float(np.asarray(found.bytes)[self.rows].max(initial=memory)))

    def x(self, size: Num) -> Num:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / self.wide

    def y(self, seconds: Num) -> Num:
        share = np.log(seconds / self.best * 1.05) / math.log(self.top / self.best * 1.05)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    def frontier(self) -> list[Point]:
        """Layouts that weft runs of which no other is both faster and smaller, fastest first."""
        points, least = [], math.inf
        for index in self.rows:
            size = float(self.found.bytes[index])
            if size < 0.995 * least and (point := self._point(int(index))):
                points.append(point)
                least = size
        return points

    def cells(self) -> list[tuple[int, str]]:
        """Of the layouts on each dot, the fastest; and whether it fits: fitting, tight, failing."""
        x, y = self.x(self.found.bytes[self.rows]) // CELL, self.y(self.found.told[self.rows]) // CELL
        _, first = np.unique(x * HEIGHT + y, return_index=True)
        rows = self.rows[np.sort(first)]
        how = np.select([self.found.sure[rows], self.found.fits[rows]], ["fitting", "tight"], "failing")
        return list(zip(map(int, rows), map(str, how), strict=True))

    def points(self) -> list[Point]:
        """What a hand over the picture is told."""
        return [point for index, _ in self.cells() if (point := self._point(index))]

    def _point(self, index: int) -> Point | None:
        try:
            layout = self.found.layout(index)
        except ValueError:  # weft does not run it
            return None
        seconds, size = float(self.found.told[index]), float(self.found.bytes[index])
        return Point(float(self.x(size)), float(self.y(seconds)), layout, seconds, size)

    def draw(self) -> Element:
        dots = dict.fromkeys(("failing", "tight", "fitting"), "")
        for index, how in self.cells():
            x, y = self.x(self.found.bytes[index]) // CELL * CELL, self.y(self.found.told[index]) // CELL * CELL
            dots[how] += f"M{x:.0f} {y:.0f}h3v3h-3z"
        frontier = self.frontier()
        line = " ".join(f"{point.x:.1f},{point.y:.1f}" for point in frontier)
        limit, right = float(self.x(C.usable * self.found.cluster.memory)), WIDTH - RIGHT
        marks = [
            tag("circle", tag("title", point.words), cx=point.x, cy=point.y, r=3.5, class_="mark") for point in frontier
        ]
        return tag(
            "svg",
            tag("title", f"memory of the fullest {self.unit} against time of a step, of every layout"),
            tag("rect", x=limit, y=TOP, width=max(0.0, right - limit), height=HEIGHT - BOTTOM - TOP, class_="beyond"),
            *self._axes(),
            *(tag("path", d=places, class_=how) for how, places in dots.items()),
            tag("line", x1=limit, x2=limit, y1=TOP - 6, y2=HEIGHT - BOTTOM, class_="limit"),
            tag("text", f"what a {self.unit} holds", x=limit - 6, y=TOP - 8, text_anchor="end", class_="note"),
            tag("polyline", points=line, class_="frontier"),
            *marks,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            id="pareto",
        )

    def _axes(self) -> list[Element]:
        found, bottom = [], HEIGHT - BOTTOM
        for size in _ticks(self.wide / 2**30):
            x = float(self.x(size * 2**30))
            found += [tag("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="grid")]
            found += [tag("text", f"{size:g}", x=x, y=bottom + 18, text_anchor="middle")]
        power = 10.0 ** math.floor(math.log10(self.best))
        for seconds in (step * ten for ten in (power, 10 * power, 100 * power) for step in (1, 1.5, 2, 3, 5, 7)):
            if self.best <= seconds <= self.top:
                y = float(self.y(seconds))
                found += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")]
                found += [tag("text", duration(seconds), x=LEFT - 8, y=y + 4, text_anchor="end")]
        middle = (LEFT + WIDTH - RIGHT) / 2
        found += [
            tag("text", f"GiB of the fullest {self.unit}", x=middle, y=HEIGHT - 8, text_anchor="middle", class_="note")
        ]
        return [*found, tag("text", "a step", x=LEFT - 8, y=TOP - 8, text_anchor="end", class_="note")]


def _ticks(most: float) -> list[float]:
    step = next(
        step for power in range(-1, 6) for step in (10**power, 2 * 10**power, 5 * 10**power) if most / step <= 9
    )
    return [step * index for index in range(int(most / step) + 1)]
