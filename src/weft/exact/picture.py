"""The memory of a process through a step, drawn: what of it is what, and whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree

from weft.exact.curve import Curve
from weft.exact.rank import Exact
from weft.exact.report import memory_rows, message_rows, module_rows, title, work_rows
from weft.plan.memory.moments import TENSORS
from weft.plan.show.markup import Element, page, tag
from weft.plan.show.page import STYLE
from weft.units import gibibytes

COLOURS = {
    "weights": "#2f6db5", "optimizer": "#7fa8d6", "gradients": "#c4553b", "copies": "#b98a1d", "activations": "#3f8f6b",
    "logits": "#86bfa3", "temporary": "#9aa3b2",
}  # fmt: skip
PASSES = {"forward": "#eef3fb", "backward": "#fdf1ed"}
LEFT, TOP, WIDTH, HEIGHT, BOTTOM = 76, 66, 960, 300, 64


def draw_svg(exact: Exact) -> str:
    """The picture, whole in itself."""
    return ElementTree.tostring(_picture(exact), encoding="unicode") + "\n"


def draw_page(exact: Exact) -> str:
    """Everything that is known of the process, as one page that needs nothing else."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title(exact)),
        tag("style", STYLE.read_text(encoding="utf-8")),
    )
    body = tag(
        "main",
        tag("h1", title(exact)),
        tag("p", f"{gibibytes(exact.ledger.peak)} at most, in: {exact.ledger.peak_moment}", class_="told"),
        tag("div", _picture(exact), class_="wide"),
        *_section("At the fullest moment", ("", "exact", "planned"), memory_rows(exact)),
        *_section("Whose it is", ("module", "kind", "memory"), module_rows(exact, 20)),
        *_section("Messages", ("kind", "axis", "processes", "count", "bytes", "sent"), message_rows(exact)),
        *_section("Work", ("", "FLOPs"), work_rows(exact)),
    )
    return page(tag("html", head, tag("body", body), lang="en"))


def _section(name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Element]:
    head = tag("tr", *(tag("th", column) for column in columns))
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return [tag("section", tag("h2", name), tag("div", tag("table", head, *lines), class_="wide"))]


def _picture(exact: Exact) -> Element:
    curve = Curve.of(exact.ledger)
    most = int(curve.bytes.sum(axis=0).max())
    x_scale, y_scale = (WIDTH - LEFT - 24) / curve.bytes.shape[1], HEIGHT / (1.06 * most)
    height = TOP + HEIGHT + BOTTOM
    return tag(
        "svg",
        tag("title", title(exact)),
        tag("rect", width=WIDTH, height=height, rx=10, fill="#ffffff"),
        _words(20, 30, title(exact), size=17, weight=600, anchor="start"),
        *_passes(curve, x_scale),
        *_areas(curve, x_scale, y_scale),
        *_scale(most, y_scale),
        *_legend(curve, height - 18),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, height=height, role="img",
        font_family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
    )  # fmt: skip


def _passes(curve: Curve, x_scale: float) -> Iterator[Element]:
    """Forward and backward passes, as stripes behind the areas."""
    for name, start, end in curve.phases:
        if name in PASSES:
            place = {"x": LEFT + x_scale * start, "width": x_scale * (end - start)}
            yield tag("rect", tag("title", name), y=TOP, height=HEIGHT, fill=PASSES[name], **place)
            if place["width"] > 60:
                yield _words(place["x"] + place["width"] / 2, TOP - 8, name, "#6b7280", size=11)


def _areas(curve: Curve, x_scale: float, y_scale: float) -> Iterator[Element]:
    base = curve.bytes[0] * 0
    for kind, sizes in zip(TENSORS, curve.bytes, strict=True):
        top = base + sizes
        if sizes.any():
            there = [f"{LEFT + x_scale * (at + 0.5):.1f},{TOP + HEIGHT - y_scale * y:.1f}" for at, y in enumerate(top)]
            back = [f"{LEFT + x_scale * (at + 0.5):.1f},{TOP + HEIGHT - y_scale * y:.1f}" for at, y in enumerate(base)]
            yield tag("polygon", tag("title", kind), points=" ".join([*there, *back[::-1]]), fill=COLOURS[kind])
        base = top


def _scale(most: int, y_scale: float) -> Iterator[Element]:
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + HEIGHT - y_scale * most * part
        yield tag("line", x1=LEFT, x2=WIDTH - 24, y1=y, y2=y, stroke="#1f2430", stroke_opacity=0.15)
        yield _words(LEFT - 8, y + 4, gibibytes(most * part), "#6b7280", size=11, anchor="end")


def _legend(curve: Curve, y: float) -> Iterator[Element]:
    x = float(LEFT)
    for kind, sizes in zip(TENSORS, curve.bytes, strict=True):
        if sizes.any():
            yield tag("rect", x=x, y=y - 11, width=13, height=13, rx=2.5, fill=COLOURS[kind])
            yield _words(x + 19, y, kind, size=12, anchor="start")
            x += 38 + 7 * len(kind)


def _words(
    x: float, y: float, words: str, colour: str = "#1f2430", size: int = 14, weight: int = 400, anchor: str = "middle"
) -> Element:
    return tag("text", words, x=x, y=y, fill=colour, font_size=size, font_weight=weight, text_anchor=anchor)
