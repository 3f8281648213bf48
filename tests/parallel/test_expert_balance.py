"""Balance of experts: its losses, biases and drops are the same however sequences lie over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Compared, against_one_process, make, run_forked
from test_parity import right

from weft.config.tree import Config
from weft.parallel.balance import Parts, layers
from weft.train.step import Found, find_gradients, update
from weft.train.training import build
from weft.verify.trace import step_rows

LOSSES = {"sequence": 0.5, "z": 0.05, "bias_speed": 0.01}
"""So heavy that gradients are wrong by far without them."""


@pytest.mark.parametrize(
    "layout",
    [
        "dp2.ep2", "fsdp2.mb1", "tp2", "tp2.sp.ep2.etp1", "cp2", "cp2.ring.tp2.sp.full", "pp2.mb1", "pp2.vp2.zbv.mb1",
        "fsdp2.ep2.selective.mb2",
    ],
)  # fmt: skip
def test_losses(layout: str, compared: Compared) -> None:
    right(compared(make("mixtral", layout, balance=LOSSES)))


@pytest.mark.parametrize("layout", ["fsdp2.tp2.sp.ep2.mb1", "cp2.ulysses.full", "pp2.fsdp2.mb1"])
def test_losses_and_biases(layout: str, compared: Compared) -> None:
    right(compared(make("deepseek", layout, balance=LOSSES)))


@pytest.mark.parametrize("layout", ["fsdp2.ep2.mb1", "tp2", "tp2.sp.ep2.etp1", "pp2.dp2.ep2.mb1.full"])
def test_capacity(layout: str, compared: Compared) -> None:
    right(compared(make("mixtral", layout, balance={"capacity": 0.75})))


def test_losses_in_fp16(tmp_path: Path) -> None:
    """Their gradients are scaled like all others. In a second step a token whose experts nearly tie would go elsewhere,
    where a CPU rounds products of other sizes in another way (AVX512-FP16 does)."""
    right(against_one_process(make("mixtral", "fsdp2.mb2.fp16", balance=LOSSES), tmp_path, steps=1))


def test_counts_of_a_part_would_be_noticed(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parts, "total", lambda self, counts: counts * self.ways)
    report = compared(make("mixtral", "cp2", balance={**LOSSES, "z": 0.0}))
    assert not report.right
    assert "router" in (report.first_wrong() or "")


def steps(config: Config, count: int, folder: Path) -> tuple[list[Found], dict[int, torch.Tensor]]:
    """What steps find, and the biases after them."""

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        found = []
        for step in range(1, count + 1):
            found.append(find_gradients(training.woven, training.scaler, step_rows(training, None, step)))
            update(
                training.woven, training.optimizer, training.scaler, found[-1],
                lr=1e-3, clip_norm=1.0, bias_speed=config.balance.bias_speed,
            )  # fmt: skip
        biases = {block: layer.router.bias for block, layer in layers(training.woven).items()}
        torch.save((found, biases), folder / f"{rank}.pt")

    run_forked(config.layout.world, work)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(config.layout.world)]
    return ranks[0][0], {block: bias for _, biases in ranks for block, bias in biases.items()}


def test_the_record_is_that_of_one_process(tmp_path: Path) -> None:
    """Exactly: tokens are counted once, recomputed or not, whoever routes them."""
    settings: dict = {
        "balance": {"bias_speed": 0.03, "capacity": 1.0, "sequence": 0.1}, "train": {"global_batch": 16},
    }  # fmt: skip
    for name in ("one", "cut"):
        (tmp_path / name).mkdir()
    one, biases = steps(make("deepseek", "single", **settings), 2, tmp_path / "one")
    cut, others = steps(make("deepseek", "pp2.tp2.sp.full.mb2", **settings), 2, tmp_path / "cut")
    for a, b in zip(one, cut, strict=True):
        assert a.routing is not None
        assert b.routing is not None
        assert torch.equal(a.routing.load, b.routing.load)
        assert torch.equal(a.routing.dropped, b.routing.dropped)
        assert float(a.routing.dropped.sum()) > 0
        assert a.routing.loss == pytest.approx(b.routing.loss, rel=1e-5)
    assert biases.keys() == others.keys() == {1, 2, 3}
    for block, bias in biases.items():
        assert torch.equal(bias, others[block])
        assert 0 < float(bias.abs().max()) < 0.07


def test_biases_even_the_load_out(tmp_path: Path) -> None:
    """Within 40 steps on the same few tokens a router falls for some experts; with biases it does not."""
    uneven = {}
    for speed in (0.0, 0.01):
        folder = tmp_path / str(speed)
        folder.mkdir()
        found, _ = steps(make("deepseek", "single", balance={"bias_speed": speed}), 40, folder)
        uneven[speed] = sum(1 - one.routing.entropy for one in found[-5:] if one.routing is not None) / 5
    assert uneven[0.01] < 0.5 * uneven[0.0]
