import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weft.train.log import FILE, RunLog, read_log
from weft.train.metrics import Metrics


def make_metrics(step: int, loss: float = 2.0, valid_loss: float | None = None) -> Metrics:
    return Metrics(
        step=step, loss=loss, lr=1e-3, grad_norm=0.5, tokens=step * 8, seconds=0.1, tokens_per_second=80.0,
        mfu=0.4, mfu_causal=0.3, memory=1 << 20, valid_loss=valid_loss, time=1.7e9 + step,
    )  # fmt: skip


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_log(run)]


def write_steps(run: Path, *steps: int, start_step: int = 0) -> None:
    with RunLog(run, start_step=start_step, tensorboard=False) as log:
        for step in steps:
            log.write(make_metrics(step))


def test_a_step_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(make_metrics(1, valid_loss=2.5))
        assert read_log(tmp_path) == [make_metrics(1, valid_loss=2.5).as_dict()]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    write_steps(tmp_path, 4, 5, 6, start_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    write_steps(tmp_path, 1)
    assert steps_of(tmp_path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 3, "lo')
    assert steps_of(tmp_path) == [1, 2]
    write_steps(tmp_path, 3, start_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Files end at so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_waits_for_room(tmp_path: Path) -> None:
    notes: list[str] = []
    with RunLog(tmp_path, tensorboard=False, note=notes.append) as log:
        log.write(make_metrics(1))
        with no_file_beyond((tmp_path / FILE).stat().st_size + 100):  # within the second line
            log.write(make_metrics(2))
            log.write(make_metrics(3))
            assert steps_of(tmp_path) == [1]
        log.write(make_metrics(4))
        assert steps_of(tmp_path) == [1, 2, 3, 4]
    (note,) = notes
    assert f"{tmp_path / FILE} cannot be written; lines wait until it can be, and training goes on" in note


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    notes: list[str] = []
    with RunLog(tmp_path, tensorboard=False, note=notes.append) as log:
        log.board = Full()
        log.write(make_metrics(1))
        log.write(make_metrics(2))
    assert steps_of(tmp_path) == [1, 2]
    assert notes == [
        "tensorboard/ cannot be written, [Errno 28] No space left on device, and ends at step 1; log.jsonl has every step"
    ]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 is no step of a run"):
        read_log(tmp_path)


def test_a_damaged_log_keeps_no_run_from_going_on(tmp_path: Path) -> None:
    log, before = tmp_path / FILE, '{"step": 1}\n\0\0\0\nnull\n{"step": 3}\n{"step": 4}\n'
    log.write_text(before)
    notes: list[str] = []
    with RunLog(tmp_path, start_step=3, tensorboard=False, note=notes.append) as resumed:
        resumed.write(make_metrics(4))
    assert steps_of(tmp_path) == [1, 3, 4]
    copy = tmp_path / "log.damaged"
    assert copy.read_text() == before
    assert notes == [
        f"{log}, line 2 is no step of a run: {chr(0) * 3!r}: left out, with 1 more; the file as it was is {copy}"
    ]


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is .* the folder of a run"):
        read_log(tmp_path)


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(make_metrics(1, loss=math.nan))
        log.write(make_metrics(2, loss=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in lines] == [None, None]


def test_only_the_active_process_writes(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", active=False) as log:
        log.write(make_metrics(1))
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_same_numbers_once_after_a_resume(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(make_metrics(step, loss=float(step), valid_loss=9.0 if step == 2 else None))
    with RunLog(tmp_path, start_step=2) as log:
        log.write(make_metrics(3, loss=30.0))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.step for event in events.Scalars("loss/valid")] == [2]
