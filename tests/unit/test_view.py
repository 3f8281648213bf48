import io
import math
import os
import sys

import pytest
from rich.console import Console

from weft.config.tree import Config
from weft.models.shape import Shape
from weft.train.chart import bounds, draw
from weft.train.hardware import Peak
from weft.train.live import MOST_POINTS, LiveView
from weft.train.metrics import Metrics
from weft.train.view import Facts, PlainView, View, make_view
from weft.units import duration, gibibytes, short

SHAPE = Shape(num_layers=2, hidden=8, num_heads=2, ffn=16, vocab=32, max_seq=16)  # type: ignore[call-arg]
CONFIG = Config.model_validate({"model": SHAPE, "train": {"steps": 1000, "global_batch": 4}, "run": "runs/[toy]"})
FACTS = Facts.of(CONFIG, world=2, peak=Peak(989e12, "datasheet", "NVIDIA H100 80GB HBM3"))


def make_metrics(step: int, loss: float = 2.0, valid_loss: float | None = None, skipped: bool = False) -> Metrics:
    return Metrics(
        step=step, loss=loss, lr=1e-3, grad_norm=0.5, tokens=step * 41_234, seconds=0.3, tokens_per_second=412_345.0,
        mfu=0.413, mfu_causal=0.389, memory=54 << 30, valid_loss=valid_loss, skipped=skipped, mean_seconds=0.1, eta=751.0,
    )  # fmt: skip


def make_console(width: int = 80, *, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, height=24, force_terminal=terminal, color_system=None)


def picture(view: LiveView, console: Console) -> list[str]:
    return ["".join(part.text for part in line) for line in console.render_lines(view, console.options)]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_picture_fits_the_terminal(width: int) -> None:
    console = make_console(width)
    view = LiveView(FACTS, console)
    for step in range(1, 301):
        view.step(make_metrics(step, loss=2 + 8 / step, valid_loss=2.5 if step % 100 == 0 else None))
    view.saved(300)
    lines = picture(view, console)
    assert len(lines) <= 24
    assert {len(line.rstrip()) for line in lines} == {min(width, 120)}
    if width >= 80:
        text = "\n".join(lines)
        for shown in ("runs/[toy]", "2 × NVIDIA H100", "989 TFLOP/s datasheet", "valid 2.5000 at 300", "300 / 1,000",
                      "12:31 left", "412k", "41.3 %", "38.9 %", "54 GiB", "saved step 300"):  # fmt: skip
            assert shown in text


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 2.0], [math.nan], [math.nan, math.inf, 1.0], [0.0, 0.0, 0.0]])
def test_the_picture_can_be_drawn_from_the_first_step_on(losses: list[float]) -> None:
    console = make_console()
    view = LiveView(FACTS, console)
    for step, loss in enumerate(losses, start=1):
        view.step(make_metrics(step, loss=loss, valid_loss=loss, skipped=not math.isfinite(loss)))
    text = "\n".join(picture(view, console))
    assert ("the first step is on its way" in text) == (not losses)


def test_a_skipped_step_is_told() -> None:
    console = make_console()
    view = LiveView(FACTS, console)
    view.step(make_metrics(1, loss=math.nan, skipped=True))
    assert "loss nan  step skipped: not finite" in "\n".join(picture(view, console))


def test_a_long_run_keeps_a_bounded_number_of_points() -> None:
    view = LiveView(FACTS, make_console())
    for step in range(1, 3 * MOST_POINTS):
        view.step(make_metrics(step, loss=float(step)))
    assert len(view.train) <= MOST_POINTS
    assert view.train[0][0] == pytest.approx(view.train[0][1])
    assert view.train[-1][0] == 3 * MOST_POINTS - 1


def test_a_resumed_run_has_its_whole_curve() -> None:
    history = [make_metrics(1).as_dict(), {"step": 2, "loss": None, "valid_loss": 3.0}]
    view = LiveView(FACTS, make_console(), history)
    assert (view.train, view.valid) == ([(1, 2.0)], [(2, 3.0)])


def test_the_live_view_draws_and_stops() -> None:
    console = make_console()
    with make_view("live", FACTS, console=console) as view:
        view.step(make_metrics(1))
        view.note("a [note]")
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loss 2.0000" in output
    assert "a [note]" in output


def test_plain_lines_are_aligned() -> None:
    console = make_console(terminal=False)
    with make_view("plain", FACTS, console=console) as view:
        view.step(make_metrics(1, loss=11.25))
        view.step(make_metrics(1000, valid_loss=3.0, skipped=True))
        view.saved(1000)
        view.note("stopping")
    head, first, last, saved, note = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert head.startswith("weft runs/[toy]: llama ")
    assert first == (
        "step    1/1000  loss 11.2500  lr 1.00e-03  grad  0.500   412k tok/s  mfu 41.3 % (38.9 causal)  100 ms"
        "    54 GiB  eta   12:31"
    )
    assert last[: len(first)].replace("1000/", "   1/").replace(" 2.0000", "11.2500") == first
    assert last[len(first) :] == "  valid 3.0000  skipped: not finite"
    assert (saved, note) == ("saved step 1000", "stopping")


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_training_goes_on_where_nobody_reads_any_more(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with make_view(mode, FACTS) as view:
            os.close(reader)
            view.step(make_metrics(1))
            view.note("a note")
            view.step(make_metrics(2))
        stdout.flush()  # as the interpreter does at its end


def test_auto_is_live_on_a_terminal_and_plain_elsewhere() -> None:
    assert isinstance(make_view("auto", FACTS, console=make_console()), LiveView)
    assert isinstance(make_view("auto", FACTS, console=make_console(terminal=False)), PlainView)
    assert type(make_view("off", FACTS)) is View
    assert type(make_view("live", FACTS, active=False)) is View


def test_the_chart_falls_from_the_top_left_to_the_bottom_right() -> None:
    points = [(float(step), 10.0 - step) for step in range(11)]
    rows = draw(points, 11, 4, 0, 10, 0, 10)
    filled = [[column for column, cell in enumerate(row) if cell != "\u2800"] for row in rows]
    assert filled[0][0] == 0
    assert filled[-1][-1] == 10
    assert all(above[-1] <= below[0] + 1 for above, below in zip(filled, filled[1:], strict=False))  # noqa: RUF007
    assert sorted({column for row in filled for column in row}) == list(range(11))


def test_the_first_fall_leaves_the_chart() -> None:
    points = [(float(step), 100.0 if step < 5 else 3.0 + 0.01 * (step % 2)) for step in range(100)]
    low, high = bounds(points)
    assert 2.9 < low < 3 < high < 3.1
    rows = draw(points, 50, 4, 0, 99, low, high)
    assert {row[:2] for row in rows} == {"\u2800\u2800"}


def test_numbers_for_people() -> None:
    numbers = (950, 412_345, 8.03e9, 999_990, 0.4)
    assert [short(number) for number in numbers] == ["950", "412k", "8.03B", "1.00M", "0.40"]
    assert [gibibytes(count) for count in (54.1 * 2**30, 2**30, 300 * 2**20)] == ["54.1 GiB", "1 GiB", "300 MiB"]
    times = (0.84, 1.27, 59.94, 751, 3753, 273_600, math.inf)
    assert [duration(time) for time in times] == [
        "840 ms", "1.27 s", "59.9 s", "12:31", "1:02:33", "3 d 04:00 h", "–",
    ]  # fmt: skip
