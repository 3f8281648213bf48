"""Draws layouts.svg, how 8 processes of dp2.tp2.pp2 share a model of 4 blocks: python docs/make_picture.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weft.config.layout import Layout
from weft.plan.show.words import ranks

PICTURE = Path(__file__).with_name("layouts.svg")
LAYOUT, BLOCKS, BATCH = Layout.parse("dp2.tp2.pp2"), 4, 8

WIDTH, HEIGHT = 960, 670
INK, SOFT, EMPTY, PAPER = "#1f2430", "#6b7280", "#eceff4", "#ffffff"
DATA, TENSOR, STAGE = "#3b6fb6", "#c8553d", "#4a8f5c"  # the axes: dp, tp, pp
LEFT, TOP = 170, 96
BOX_W, BOX_H, GAP_X, GAP_TP, GAP_DP = 320, 84, 110, 32, 66


def made(_: Path = PICTURE) -> str:
    style = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {style}>"
    sheet = f"<rect width='{WIDTH}' height='{HEIGHT}' rx='12' fill='{PAPER}'/>"
    title = "8 processes of dp2.tp2.pp2 share a model of 4 blocks and a batch of 8 sequences"
    return "\n".join([head, f"<title>{title}</title>", sheet, *markers(), *parts(), "</svg>"]) + "\n"


def parts() -> Iterator[str]:
    yield text(WIDTH / 2, 36, f"{LAYOUT} on {LAYOUT.world} processes", size=19, weight=600)
    for stage, blocks in enumerate([range(2), range(2, 4)]):
        x = column(stage)
        yield text(x + BOX_W / 2, 72, f"stage {stage} of the pipeline", STAGE, weight=600)
        for replica in range(LAYOUT.dp):
            for share in range(LAYOUT.tp):
                yield from process(stage, replica, share, blocks)
            yield from tensor_arrow(x, row(replica, 0))
        yield from replica_arrow(x, row(0, 1), row(1, 0))
    for replica in range(LAYOUT.dp):
        yield from batch(replica)
        yield from pipeline_arrow(row(replica, 0))
    yield from legend()


def process(stage: int, replica: int, share: int, blocks: range) -> Iterator[str]:
    """A box with the process's rank, and the modules of its stage: its share of their matrices is filled."""
    x, y = column(stage), row(replica, share)
    rank = (stage * LAYOUT.dp + replica) * LAYOUT.tp + share  # pp outermost, tp innermost: parallel/mesh.py
    edge = f"fill='none' stroke='{INK}' stroke-width='1.5'"
    yield f"<rect x='{x}' y='{y}' width='{BOX_W}' height='{BOX_H}' rx='8' {edge}/>"
    yield text(x + 12, y + 21, f"rank {rank}", anchor="start", weight=600)
    modules = [f"block {index}" for index in blocks]
    modules = (["embed"] if stage == 0 else []) + modules + (["head"] if stage == LAYOUT.pp - 1 else [])
    width, height = 82, 34
    for index, name in enumerate(modules):
        left, top = x + 20 + index * (width + 17), y + 31
        half = height / LAYOUT.tp
        yield f"<rect x='{left}' y='{top}' width='{width}' height='{height}' rx='3' fill='{EMPTY}'/>"
        yield f"<rect x='{left}' y='{top + share * half}' width='{width}' height='{half}' rx='3' fill='{TENSOR}'/>"
        yield text(left + width / 2, top + height + 14, name, SOFT, size=12)


def tensor_arrow(x: float, y: float) -> Iterator[str]:
    middle = x + 60
    yield line(middle, y + BOX_H + 3, middle, y + BOX_H + GAP_TP - 3, TENSOR, both=True)
    yield text(middle + 12, y + BOX_H + GAP_TP / 2 + 4, "tp: their partial sums are added up", TENSOR, "start", 12)


def replica_arrow(x: float, above: float, below: float) -> Iterator[str]:
    for offset in (60, BOX_W - 60):
        yield line(x + offset, above + BOX_H + 5, x + offset, below - 5, DATA, both=True)
    yield text(x + BOX_W / 2, above + BOX_H + GAP_DP / 2 - 3, "dp: gradients of the same half", DATA, size=12)
    yield text(x + BOX_W / 2, above + BOX_H + GAP_DP / 2 + 13, "are added up, once a step", DATA, size=12)


def pipeline_arrow(y: float) -> Iterator[str]:
    for share in range(LAYOUT.tp):
        left, right, at = column(0) + BOX_W + 6, column(1) - 6, y + share * (BOX_H + GAP_TP) + BOX_H / 2
        yield line(left, at - 7, right, at - 7, STAGE)
        yield line(right, at + 9, left, at + 9, STAGE)
        yield text((left + right) / 2, at - 14, "activations", STAGE, size=12)
        yield text((left + right) / 2, at + 25, "gradients", STAGE, size=12)


def batch(replica: int) -> Iterator[str]:
    """The sequences that a replica works on, in a column at the left."""
    local = BATCH // LAYOUT.dp
    height = 2 * BOX_H + GAP_TP
    top = row(replica, 0)
    yield text(
        80, top + height / 2 - 52, f"sequences {replica * local}–{(replica + 1) * local - 1}", DATA, weight=600, size=13
    )
    for index in range(local):
        yield f"<rect x='40' y='{top + height / 2 - 38 + 20 * index}' width='80' height='13' rx='3' fill='{DATA}'/>"
    count = LAYOUT.num_micro_batches(BATCH)
    yield text(80, top + height / 2 + 60, f"{count} micro-batches", SOFT, size=12)
    yield line(127, top + height / 2, LEFT - 5, top + height / 2, DATA)


def legend() -> Iterator[str]:
    y = row(1, 1) + BOX_H + 38
    words = (
        (DATA, f"dp2: two replicas, {ranks(LAYOUT, 'dp')}"),
        (STAGE, f"pp2: two stages, {ranks(LAYOUT, 'pp')}"),
        (TENSOR, f"tp2: each holds half of every matrix (filled), {ranks(LAYOUT, 'tp')}"),
    )
    for index, (colour, sentence) in enumerate(words):
        yield f"<rect x='{LEFT}' y='{y + 22 * index - 10}' width='12' height='12' rx='2' fill='{colour}'/>"
        yield text(LEFT + 22, y + 22 * index, sentence, anchor="start", size=13)


def column(stage: int) -> float:
    return LEFT + stage * (BOX_W + GAP_X)


def row(replica: int, share: int) -> float:
    return TOP + replica * (2 * BOX_H + GAP_TP + GAP_DP) + share * (BOX_H + GAP_TP)


def text(
    x: float, y: float, words: str, colour: str = INK, anchor: str = "middle", size: int = 14, weight: int = 400
) -> str:
    place = f"x='{x:g}' y='{y:g}' text-anchor='{anchor}'"
    return f"<text {place} font-size='{size}' font-weight='{weight}' fill='{colour}'>{words}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, both: bool = False) -> str:
    name = colour.lstrip("#")
    start = f" marker-start='url(#a{name})'" if both else ""
    place = f"x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}'"
    return f"<line {place} stroke='{colour}' stroke-width='2' marker-end='url(#a{name})'{start}/>"


def markers() -> Iterator[str]:
    for colour in (DATA, TENSOR, STAGE):
        size = "viewBox='0 0 8 8' refX='7' refY='4' markerWidth='5' markerHeight='5' orient='auto-start-reverse'"
        tip = f"<path d='M0 0 L8 4 L0 8 z' fill='{colour}'/>"
        yield f"<defs><marker id='a{colour.lstrip('#')}' {size}>{tip}</marker></defs>"


if __name__ == "__main__":
    PICTURE.write_text(made(), encoding="utf-8")
