import itertools
import math

import pytest

from weft.config.tree import ScheduleConfig
from weft.train.schedule import learning_rate


def rates(steps: int = 100, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate(step, schedule, peak=2.0, steps=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_never_zero_and_reaches_the_peak(kind: str) -> None:
    values = rates(kind=kind, warmup=10)
    assert values[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(values) == values[9] == 2.0
    assert values[0] > 0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_min_ratio_of_the_peak_and_stays_there(kind: str, min_ratio: float) -> None:
    values = rates(kind=kind, warmup=10, min_ratio=min_ratio)
    assert values[-1] == pytest.approx(2.0 * min_ratio, abs=1e-12)
    schedule = ScheduleConfig.model_validate({"kind": kind, "warmup": 10, "min_ratio": min_ratio})
    assert learning_rate(1000, schedule, peak=2.0, steps=100) == values[-1]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values[9:]))


def test_cosine_by_its_formula() -> None:
    values = rates(kind="cosine", warmup=20, min_ratio=0.1)
    assert values[59] == pytest.approx(0.2 + 1.8 * 0.5)  # half way
    assert values[39] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_linear_is_a_line() -> None:
    assert rates(kind="linear", min_ratio=0.0) == pytest.approx([2 - 0.02 * step for step in range(1, 101)])


def test_wsd_stays_at_the_peak_until_its_descent() -> None:
    values = rates(kind="wsd", warmup=10, decay=20, min_ratio=0.5)
    assert values[9:80] == [2.0] * 71
    assert values[80:] == pytest.approx([2.0 - 0.05 * step for step in range(1, 21)])


def test_wsd_descends_over_a_tenth_of_the_run_by_default() -> None:
    values = rates(kind="wsd", min_ratio=0.0)
    assert values[89] == 2.0
    assert values[90] < 2.0


def test_wsd_descent_never_reaches_into_the_warmup() -> None:
    values = rates(kind="wsd", warmup=97, min_ratio=0.0)
    assert values[96:] == pytest.approx([2.0, 4 / 3, 2 / 3, 0.0])


def test_a_run_of_one_step() -> None:
    assert rates(steps=1, kind="cosine", min_ratio=0.1) == pytest.approx([0.2])


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="step 0: steps count from 1"):
        learning_rate(0, ScheduleConfig(), peak=1.0, steps=10)
