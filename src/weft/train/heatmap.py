"""The picture of where experts' tokens went: each expert of each block at the end, and the busiest ones over time."""

from __future__ import annotations

from pathlib import Path

from weft.train.curve import STYLE
from weft.train.log import ROUTING, read_log

EDGE = 3.0
"""Even shares at which colours end."""


def draw_routing(run: str | Path, out: str | Path) -> Path:
    """Draw the load of experts, in even shares: 1 is what each has where all have the same.

    Args:
        run: folder of a run of a model with experts.
        out: the picture; .png, .svg or .pdf.

    Raises:
        ValueError: the folder has no `routing.jsonl`.
    """
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    lines = read_log(run, ROUTING)
    if not lines:
        raise ValueError(f"{Path(run) / ROUTING} is empty: no step was logged")
    load = np.array([line["load"] for line in lines], dtype=float)  # [lines, blocks, X]
    load /= load.mean(axis=2, keepdims=True)
    steps = [line["step"] for line in lines]
    blocks, experts = load.shape[1:]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(10, min(8.0, 2.6 + 0.12 * blocks)), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        norm = TwoSlopeNorm(1.0, 0.0, EDGE)
        image = left.imshow(load[-1], norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        left.set_title(f"each expert, step {steps[-1]:,}", loc="left", fontsize=10)
        left.set_xlabel("expert")
        left.set_ylabel("block with experts")
        left.set_xticks(_ticks(experts))
        left.set_yticks(_ticks(blocks))
        right.imshow(load.max(axis=2).T, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        right.set_title("the busiest expert, over time", loc="left", fontsize=10)
        right.set_xlabel("step")
        shown = _ticks(len(steps))
        right.set_xticks(shown, [f"{steps[index]:,}" for index in shown])
        bar = figure.colorbar(image, ax=(left, right), extend="max")
        bar.set_label("tokens, in even shares")
        figure.savefig(out, metadata={"Date": None} if Path(out).suffix == ".svg" else None)
    return Path(out)


def _ticks(count: int, most: int = 8) -> list[int]:
    """Of 0 … count - 1, a few that lie evenly, the first among them."""
    return list(range(0, count, -(-count // most)))
