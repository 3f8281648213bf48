"""What a person sees of a run: a live picture on a terminal, or one line for each logged step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TextIO, cast

from rich.console import Console

from weft.config.tree import Config
from weft.train.hardware import Peak
from weft.train.metrics import Metrics
from weft.train.outlet import Outlet
from weft.units import duration, gibibytes, short


@dataclass(frozen=True)
class Facts:
    """What does not change during the run."""

    run: str
    model: str
    batch: str
    place: str
    peak: str
    steps: int
    layout: str

    @staticmethod
    def of(config: Config, *, world: int, peak: Peak) -> Facts:
        shape = config.model
        return Facts(
            run=config.run,
            model=f"{shape.family} {short(shape.num_params)} · {shape.num_layers} layers × {shape.hidden:,}",
            batch=f"{config.train.global_batch:,} × {config.seq:,} tokens",
            place=f"{world} × {peak.device}",
            peak=str(peak),
            steps=config.train.steps,
            layout=str(config.layout),
        )


class View:
    """Shows nothing; the other views show more. Use it in a `with` block."""

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        pass

    def step(self, metrics: Metrics) -> None:
        """A step is done."""

    def saved(self, step: int) -> None:
        """A checkpoint of this step is whole on disk."""

    def note(self, text: str) -> None:
        """Something that should be read."""


class PlainView(View):
    """One aligned line for each logged step, for files and CI."""

    def __init__(self, facts: Facts, console: Console) -> None:
        self.facts, self.console = facts, console

    def __enter__(self) -> View:
        facts = self.facts
        self._print(f"weft {facts.run}: {facts.model}, {facts.batch}, {facts.layout}, {facts.place}, {facts.peak}")
        return self

    def step(self, metrics: Metrics) -> None:
        wide = len(str(self.facts.steps))
        parts = [
            f"step {metrics.step:>{wide}}/{self.facts.steps}",
            f"loss {metrics.loss:7.4f}",
            f"lr {metrics.lr:.2e}",
            f"grad {metrics.grad_norm:6.3f}",
            f"{short(metrics.tokens_per_second):>5} tok/s",
            f"mfu {100 * metrics.mfu:4.1f} % ({100 * metrics.mfu_causal:4.1f} causal)",
            f"{duration(metrics.mean_seconds):>6}",
            f"{gibibytes(metrics.memory):>8}",
            f"eta {duration(metrics.eta):>7}",
        ]
        if metrics.valid_loss is not None:
            parts.append(f"valid {metrics.valid_loss:.4f}")
        if metrics.busiest_expert is not None:
            parts.append(f"busiest expert {metrics.busiest_expert:.1f}x")
        if metrics.dropped:
            parts.append(f"dropped {100 * metrics.dropped:.1f} %")
        if metrics.skipped:
            parts.append("skipped: not finite")
        self._print("  ".join(parts))

    def saved(self, step: int) -> None:
        self._print(f"saved step {step}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


def make_view(
    mode: Literal["auto", "live", "plain", "off"],
    facts: Facts,
    *,
    active: bool = True,
    history: Iterable[Mapping[str, Any]] = (),
    console: Console | None = None,
) -> View:
    """The view that `log.view` asks for; auto: live on a terminal, else plain.

    Args:
        active: False in every process but rank 0: nothing is shown.
        history: records of earlier steps (`read_log`), so that the curve of a resumed run is whole.
    """
    if mode == "off" or not active:
        return View()
    console = console or Console(file=cast(TextIO, Outlet(sys.stdout)))
    if mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal):
        from weft.train.live import LiveView  # it builds on this file

        return LiveView(facts, console, history)
    return PlainView(facts, console)
