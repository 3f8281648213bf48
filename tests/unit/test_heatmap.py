"""The picture of a run's routing, from what its log holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weft.parallel.balance import Routing
from weft.train.heatmap import draw_routing
from weft.train.log import ROUTING, RunLog, read_log


def routing(seed: int, blocks: int = 3, experts: int = 8) -> Routing:
    load = torch.randint(0, 50, (blocks, experts), generator=torch.Generator().manual_seed(seed)).double()
    return Routing(load, torch.zeros(blocks), 0.0)


def test_numbers_of_a_load() -> None:
    even = Routing(torch.full((2, 4), 5.0), torch.tensor([4.0, 0.0]), 0.0)
    assert (even.imbalance, even.entropy, even.dropped_share) == pytest.approx((1.0, 1.0, 0.1))
    one = Routing(torch.tensor([[20.0, 0, 0, 0]]), torch.zeros(1), 0.0)
    assert (one.imbalance, one.entropy) == (4.0, 0.0)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_made_of_the_log(suffix: str, tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write_routing(step, routing(step))
    assert [line["step"] for line in read_log(tmp_path, ROUTING)] == [10, 20, 30]
    picture = draw_routing(tmp_path, tmp_path / f"routing{suffix}")
    assert picture.stat().st_size > 5000
    if suffix == ".svg":
        text = picture.read_text()
        assert "each expert, step 30" in text
        assert "tokens, in even shares" in text


def test_a_resumed_run_drops_later_lines(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write_routing(step, routing(step))
    with RunLog(tmp_path, start_step=20, tensorboard=False):
        pass
    assert [line["step"] for line in read_log(tmp_path, ROUTING)] == [10, 20]


def test_a_run_without_routing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no log .*routing\.jsonl"):
        draw_routing(tmp_path, tmp_path / "routing.png")
