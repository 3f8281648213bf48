"""Muon: the same update under every layout, each matrix worked on by one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Compared, make
from test_parity import right

from weft.config.tree import Config
from weft.train import muon


def by_muon(model: str, layout: str) -> Config:
    return make(model, layout, optimizer={"kind": "muon", "lr": 1e-3})


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "mb4"),
        ("llama", "dp2"),
        ("llama", "fsdp4"),
        ("gpt2", "fsdp2.zero1.mb2"),
        ("gpt2", "tp2.sp"),
        ("llama", "dp2.fsdp2.tp2.mb2"),
        ("qwen3", "fsdp2.tp2.sp.pp2.mb1.full"),
        ("llama", "fsdp2.tp2.bf16"),
        ("llama", "fsdp2.cp2.ring"),
        ("gpt2", "dp2.cp2.tp2"),
        ("mixtral", "dp2.ep2"),
        ("mixtral", "fsdp4.ep2.mb2"),
        ("mixtral", "tp2.sp.ep2.etp1"),
        ("deepseek", "fsdp2.ep2.pp2.mb2"),
        ("deepseek", "fsdp2.tp2.sp.mb2"),
    ],
)
def test_muon(model: str, layout: str, compared: Compared) -> None:
    right(compared(by_muon(model, layout)))


def test_shares_that_are_orthogonalized_alone_are_found(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tempting shortcut: each process makes its own share orthogonal. It trains on, and is another optimizer."""
    compared(by_muon("llama", "single"))

    def alone(self: Any, one: Any, shares: Any) -> Any:
        return [muon.newton_schulz(share[None])[0] for share in shares]

    monkeypatch.setattr(muon.Muon, "_orthogonalized", alone)
    report = compared(by_muon("llama", "fsdp2"))
    worst = report.worst("update")[0]
    assert not worst.right
    assert worst.name.startswith("blocks.")
    assert report.worst("gradient")[0].step > 1  # those of the first step are right: it is the update that is not


def test_each_matrix_has_one_owner_and_owners_take_turns() -> None:
    dims = [(64, 32), (32, 64), (32, 32), (32, 32)] * 6
    made = muon.rounds(dims, size=4)
    assert sorted(number for one in made for number in one.matrices) == list(range(len(dims)))
    owned = [owner for one in made for owner in one.owners]
    assert {owned.count(rank) for rank in range(4)} == {6}
    assert all({dims[number] for number in one.matrices} == {one.dims} for one in made)


@pytest.mark.parametrize("dims", [(24, 48), (48, 24), (64, 32)])
def test_newton_schulz_brings_singular_values_near_one(dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *dims)
    values = torch.linalg.svdvals(muon.newton_schulz(x))
    assert 0.4 < values.min() < values.max() < 1.3
