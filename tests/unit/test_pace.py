"""How long a step may take, going by those before."""

from __future__ import annotations

from weft.serve.pace import SURE_SECONDS, TIMES, Pace


def test_a_step_hangs_after_many_times_what_its_like_took() -> None:
    pace = Pace()
    assert pace.patience(1, 60.0) == 60.0  # nothing is known
    pace.took(1, 0.01)
    assert pace.patience(1, 60.0) == SURE_SECONDS
    assert pace.patience(1, 2.0) == 2.0
    pace.took(1, 1.0)
    pace.took(1, 0.01)  # the slowest counts
    assert pace.patience(1, 60.0) == TIMES * 1.0
    pace.took(512, 0.5)
    assert pace.patience(700, 60.0) == TIMES * 0.5  # of the same kind: 512 to 1,023


def test_a_step_of_more_tokens_may_take_as_long_as_its_tokens_one_by_one() -> None:
    pace = Pace()
    pace.took(1, 0.01)
    assert pace.patience(128, 1e9) == TIMES * 0.01 * 128
    assert pace.patience(512, 60.0) == 60.0
    pace = Pace()
    pace.took(512, 3.0)
    assert pace.patience(1, 1e9) == TIMES * 3.0  # that of fewer, no longer than theirs
