"""The loss curve of one run, or of several over each other, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.train.log import read_log
from weft.units import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555",
    "xtick.labelcolor": "#333333", "ytick.labelcolor": "#333333", "axes.grid": True, "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none",
}  # fmt: skip


def draw_curves(runs: Sequence[str | Path], out: str | Path, *, log: bool = False) -> Path:
    """Draw the training loss of each run (smooth over raw) and its validation loss, over steps.

    Args:
        runs: folders of runs.
        out: the picture; its suffix says which kind: .png, .svg, .pdf.
        log: logarithmic steps, on which a power law of the loss is nearly a line.

    Returns:
        `out`.

    Raises:
        ValueError: no run, a folder without a log, a log without a finite loss, or a suffix that is not known.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Path(out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{out}: a picture ends in .png, .svg or .pdf")
    if not runs:
        raise ValueError("which runs? Name at least one folder of a run")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lowest, highest = math.inf, -math.inf
        for index, run in enumerate(runs):
            low, high = _draw_run(axes, Path(run), COLORS[index % len(COLORS)], alone=len(runs) == 1, log=log)
            lowest, highest = min(lowest, low), max(highest, high)
        margin = 0.06 * (highest - lowest) or 0.05
        axes.set_ylim(lowest - margin, highest + margin)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value < 1e5 else short(value))
        axes.margins(x=0.01)
        axes.legend(loc="upper right")
        if len(runs) == 1:
            axes.set_title(str(runs[0]), loc="left", fontsize=10, color="#333333")
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    return out


def smooth(values: Sequence[float]) -> list[float]:
    """Means over windows around each value, which grow with the steps: no lag, unlike a moving mean of the past."""
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        half = min(index // 15, len(values) // 60)
        start, end = index - half, min(len(values), index + half + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _draw_run(axes: Axes, run: Path, color: str, *, alone: bool, log: bool) -> tuple[float, float]:
    """Draw one run; returns the range of loss to show, on linear steps without the steep first fall."""
    records = read_log(run)
    train = _points(records, "loss")
    valid = _points(records, "valid_loss")
    if not train:
        raise ValueError(f"{run}: its log has no finite loss to draw")
    steps, losses = zip(*train, strict=True)
    line = smooth(losses)
    name = "training" if alone else run.name
    axes.plot(steps, losses, color=color, alpha=0.22, linewidth=0.7)
    axes.plot(steps, line, color=color, linewidth=1.6, label=f"{name}  {line[-1]:.3f}")
    if valid:
        at, values = zip(*valid, strict=True)
        label = f"validation  {values[-1]:.3f}" if alone else None
        shade = "#d55e00" if alone else color
        axes.plot(at, values, "o-", color=shade, label=label, linewidth=0.8, markersize=4, markerfacecolor="white")
    shown = [*line[0 if log else len(line) // 20 :], *(value for _, value in valid)]
    return min(shown), max(shown)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]
