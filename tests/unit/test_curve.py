import json
from pathlib import Path

import pytest

from weft.train.curve import draw_curves, smooth


def make_run(folder: Path, losses: list[float | None]) -> Path:
    folder.mkdir()
    records = [
        {"step": step, "loss": loss, "valid_loss": loss if step % 10 == 0 else None}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2 + 8 / step for step in range(1, 101)])
    picture = draw_curves([run], tmp_path / "loss.svg")
    text = picture.read_text()
    for word in ("training", "validation", "step", "loss", "2.080"):
        assert word in text
    assert draw_curves([run], tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_over_each_other(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [3.0, None, 2.0 + index]) for index, name in enumerate(["first", "second"])]
    text = draw_curves(runs, tmp_path / "both.svg", log=True).read_text()
    assert "first" in text
    assert "second" in text


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [None, 2.0]])
def test_short_runs(tmp_path: Path, losses: list[float | None]) -> None:
    assert draw_curves([make_run(tmp_path / "run", losses)], tmp_path / "loss.png").exists()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg or \.pdf"):
        draw_curves([tmp_path], tmp_path / "loss.jpeg")
    with pytest.raises(ValueError, match="at least one folder"):
        draw_curves([], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="there is no log"):
        draw_curves([tmp_path], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="no finite loss"):
        draw_curves([make_run(tmp_path / "run", [None])], tmp_path / "loss.png")


def test_smoothing_does_not_lag() -> None:
    line = [float(step) for step in range(1000)]
    assert smooth(line)[:980] == pytest.approx(line[:980])
    noisy = [1.0 + (-1) ** step for step in range(1000)]
    assert smooth(noisy)[500:] == pytest.approx([1.0] * 500, abs=0.1)
