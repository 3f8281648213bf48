"""Draws docs/accuracy.svg, what is predicted of published runs against what was measured.

python benchmarks/planner_picture.py ../shared/data/published-runs.jsonl.gz
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

import planner
from common import ROOT
from weft.plan.show.markup import Element, tag
from weft.tune.picture import BEST, LEFT, LINE, MAIN, PAPER, SIDE, SOFT, TOP, Axis, frame, label

ELSEWHERE, UNSEEN, FITTED = "written down from elsewhere", "of the file, not fitted to", "of the file, fitted to"
COLOURS = {FITTED: SOFT, UNSEEN: BEST, ELSEWHERE: MAIN}
"""In the order in which they are drawn."""
X, WIDE, TALL, GAP = LEFT + SIDE + 60, 360, 84, 72
"""Of the bars on the right."""
FAR, BINS = np.log(2), 69
"""Where the bars end: what is further off is in the last ones; and their number, an odd one, for zero to have one."""
Pairs = list[tuple[float, float]]
"""Seconds that were measured and predicted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the file that constants were fitted with")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.svg")
    args = parser.parse_args()
    kinds = {**split(args.rows), ELSEWHERE: elsewhere()}
    args.out.write_text(ElementTree.tostring(picture(kinds), encoding="unicode") + "\n", encoding="utf-8")


def split(path: Path) -> dict[str, Pairs]:
    runs, _ = planner.read(path)
    found: dict[str, Pairs] = {FITTED: [], UNSEEN: []}
    for run, seconds in zip(runs, planner.predict(runs).seconds, strict=True):
        if run.seconds and not run.duplicate:
            found[FITTED if planner.fitted_on(run) else UNSEEN].append((run.seconds, float(seconds)))
    return found


def elsewhere() -> Pairs:
    files = sorted((ROOT / "benchmarks" / "rows").glob("*.jsonl"))
    return [pair for file in files for pairs in split(file).values() for pair in pairs]


def picture(kinds: dict[str, Pairs]) -> Element:
    axis = Axis([seconds for pairs in kinds.values() for pair in pairs for seconds in pair])
    width, height = X + WIDE + 24, TOP + SIDE + 56
    total = sum(map(len, kinds.values()))
    return tag(
        "svg",
        tag("title", "predicted against measured time of a step, of published runs"),
        tag("rect", width=width, height=height, rx=10, fill=PAPER),
        label(20, 32, f"predicted against measured time of a step: {total:,} published runs", size=17, weight=600),
        *frame(axis),
        *(dots(axis, kinds[kind], colour) for kind, colour in COLOURS.items()),
        *(part for place, kind in enumerate(COLOURS) for part in bars(place, kind, kinds[kind])),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        font_family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
    )  # fmt: skip


def dots(axis: Axis, pairs: Pairs, colour: str) -> Element:
    path = "".join(f"M{axis.x(measured):.0f} {axis.y(predicted):.0f}h0" for measured, predicted in pairs)
    return tag(
        "path", d=path, stroke=colour, stroke_width=3, stroke_linecap="round", stroke_opacity="0.35", fill="none"
    )


def bars(place: int, kind: str, pairs: Pairs) -> Iterator[Element]:
    """How many runs are how far off."""
    bottom, colour = TOP + 20 + TALL + place * (TALL + GAP), COLOURS[kind]
    off = np.log(np.array([predicted / measured for measured, predicted in pairs]))
    counts, edges = np.histogram(np.clip(off, -FAR, FAR), BINS, (-FAR, FAR))
    near = np.abs(np.expm1(off))
    told = (
        f"half of them within {100 * np.median(near):.1f} %, {100 * np.mean(near <= 0.1):.0f} % within 10 % (the band)"
    )

    def x(share: float) -> float:
        return X + WIDE * (share + FAR) / (2 * FAR)

    yield label(X, bottom - TALL - 26, f"{len(pairs):,} {kind}", colour, size=13, weight=600)
    yield label(X, bottom - TALL - 9, told, SOFT, size=12)
    yield tag("rect", x=x(np.log(0.9)), y=bottom - TALL, width=x(np.log(1.1)) - x(np.log(0.9)), height=TALL, fill=LINE)
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        tall = TALL * count / counts.max()
        yield tag(
            "rect", x=f"{x(left):.1f}", y=f"{bottom - tall:.1f}", width=f"{x(right) - x(left) - 0.6:.1f}",
            height=f"{tall:.1f}", fill=colour,
        )  # fmt: skip
    yield tag("line", x1=X, x2=X + WIDE, y1=bottom, y2=bottom, stroke=SOFT)
    for times, words in (
        (0.5, "half and less"),
        (0.8, "0.8"),
        (1.0, "as measured"),
        (1.25, "1.25"),
        (2.0, "twice, more"),
    ):
        anchor = {0.5: "start", 2.0: "end"}.get(times, "middle")
        yield label(x(np.log(times)), bottom + 14, words, SOFT, size=11, anchor=anchor)


if __name__ == "__main__":
    main()
