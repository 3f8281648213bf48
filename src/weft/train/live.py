"""The live picture of a run on a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.align import Align
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weft.train.chart import bounds, draw, place
from weft.train.metrics import Metrics
from weft.train.view import Facts, View
from weft.units import duration, gibibytes, percent, short

MOST_POINTS = 2000


class LiveView(View):
    """A picture of the run that is drawn anew in its place."""

    def __init__(self, facts: Facts, console: Console, history: Iterable[Mapping[str, Any]] = ()) -> None:
        self.facts, self.console = facts, console
        self.last: Metrics | None = None
        self.train: list[tuple[float, float]] = []
        self.valid: list[tuple[float, float]] = []
        self.last_saved: tuple[int, float] | None = None
        self.live = Live(self, console=console, refresh_per_second=4)
        for record in history:
            self._remember(record["step"], record["loss"], record.get("valid_loss"))

    def __enter__(self) -> View:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, metrics: Metrics) -> None:
        self.last = metrics
        self._remember(metrics.step, metrics.loss, metrics.valid_loss)

    def saved(self, step: int) -> None:
        self.last_saved = (step, time.monotonic())

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _remember(self, step: int, loss: float | None, valid_loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self.train.append((step, loss))
        if valid_loss is not None and math.isfinite(valid_loss):
            self.valid.append((step, valid_loss))
        if len(self.train) > MOST_POINTS:  # two neighbours become one
            pairs = zip(self.train[::2], self.train[1::2], strict=False)
            self.train = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, 120)
        inside = width - 4
        facts = self.facts
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        head.add_row(Text(facts.model), Text(facts.place))
        head.add_row(Text(f"{facts.batch} · {facts.layout}", "dim"), Text(f"peak {facts.peak}", "dim"))
        body: list[Any] = [head, Text()]
        if self.last is None:
            body.append(Align.center(Text("the first step is on its way", "dim italic")))
        else:
            height = max(4, min(9, console.size.height - 16))
            body += [self._losses(self.last), *self._curve(inside, height), Text(), self._progress(self.last), Text()]
            body.append(self._figures(self.last))
        yield Panel(
            Group(*body),
            title=Text.assemble(("weft", "bold cyan"), (f" {facts.run}", "bold default")),
            title_align="left",
            subtitle=self._saved(),
            subtitle_align="right",
            border_style="bright_black",
            width=width,
        )

    def _losses(self, metrics: Metrics) -> Table:
        row = Table.grid(expand=True)
        row.add_column()
        row.add_column(justify="right")
        loss = Text.assemble(("loss ", "dim"), (f"{metrics.loss:.4f}", "bold cyan" if _fine(metrics) else "bold red"))
        if metrics.skipped:
            loss.append("  step skipped: not finite", "red")
        valid = Text()
        if self.valid:
            step, value = self.valid[-1]
            valid = Text.assemble(
                ("◆ ", "yellow"), ("valid ", "dim"), (f"{value:.4f}", "bold yellow"), (f" at {step:,}", "dim")
            )
        row.add_row(loss, valid)
        return row

    def _curve(self, width: int, height: int) -> list[Text]:
        if len(self.train) < 2:
            return [Text() for _ in range(height + 1)]
        low, high = bounds(self.train + self.valid)
        gutter = max(len(f"{value:.2f}") for value in (low, high)) + 1
        first, last = self.train[0][0], self.train[-1][0]
        wide = width - gutter
        rows = [Text(row, "cyan") for row in draw(self.train, wide, height, first, last, low, high)]
        for step, value in self.valid:
            if step >= first:
                column = min(wide - 1, int((step - first) / (last - first) * (wide - 1) + 0.5))
                row = place(value, low, high, height)
                rows[row] = Text.assemble(rows[row][:column], ("◆", "yellow"), rows[row][column + 1 :])
        labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
        lines = [Text.assemble((f"{labels.get(n, ''):>{gutter - 1}} ", "dim"), row) for n, row in enumerate(rows)]
        return [*lines, Text(f"{'':{gutter}}step {first:<{wide // 2 - 5},.0f}{last:>{wide - wide // 2},.0f}", "dim")]

    def _progress(self, metrics: Metrics) -> Table:
        row = Table.grid(expand=True, padding=(0, 2))
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_column(justify="right")
        done = metrics.step >= self.facts.steps
        row.add_row(
            ProgressBar(total=self.facts.steps, completed=metrics.step, complete_style="cyan", finished_style="green"),
            Text.assemble((f"{metrics.step:,}", "bold"), (f" / {self.facts.steps:,}", "dim")),
            Text("done", "bold green") if done else Text.assemble((duration(metrics.eta), "bold"), (" left", "dim")),
        )
        return row

    def _figures(self, metrics: Metrics) -> Table:
        waits = percent((metrics.data_wait + metrics.checkpoint_wait) / metrics.seconds)
        speed, memory = short(metrics.tokens_per_second), gibibytes(metrics.memory)
        rows = (
            ("tokens/s", speed, "mfu", percent(metrics.mfu), "step", duration(metrics.mean_seconds)),
            ("tokens", short(metrics.tokens), "mfu causal", percent(metrics.mfu_causal), "lr", f"{metrics.lr:.2e}"),
            ("memory", memory, "waiting", waits, "grad norm", f"{metrics.grad_norm:.3f}"),
        )
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in range(3):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(style="bold", no_wrap=True, ratio=1)
        for row in rows:
            grid.add_row(*map(Text, row))
        return grid

    def _saved(self) -> Text | None:
        if self.last_saved is None:
            return None
        step, when = self.last_saved
        ago = max(1, round(time.monotonic() - when))
        return Text.assemble(
            ("saved ", "dim default"), (f"step {step:,}", "green"), (f" {duration(ago)} ago", "dim default")
        )


def _fine(metrics: Metrics) -> bool:
    return math.isfinite(metrics.loss) and not metrics.skipped
