"""What saves memory computes what one process computes without it."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Compared, make
from test_parity import right

from weft.parallel import loss
from weft.plan import memory
from weft.plan.stage import stages
from weft.train import optimizer


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "chunked"),
        ("llama", "chunked.mb4.bf16"),
        ("llama", "chunked.dp2.mb2"),
        ("gpt2", "chunked.fsdp2.mb2.fp16"),
        ("qwen3", "chunked.tp2.sp"),
        ("llama", "chunked.fsdp2.zero2.tp2.mb2"),
        ("qwen3", "chunked.fsdp2.tp2.sp.pp2.mb1.full"),
        ("gpt2", "chunked.pp2.gpipe"),
        ("llama", "chunked.cp2.tp2.sp"),
    ],
)
def test_chunked_loss(model: str, layout: str, compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "HEAD_ROWS", 24)  # several parts, the last one smaller
    right(compared(make(model, layout)))


def test_chunked_loss_of_a_share_of_the_vocabulary(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sum over tp each process would find the softmax of its own tokens, and a plausible loss."""
    compared(make("llama", "single"))
    given = loss.give_loss

    def alone(head: Any, first: int, group: Any) -> None:
        given(head, first, None)

    monkeypatch.setattr("weft.parallel.weave.give_loss", alone)
    report = compared(make("llama", "chunked.tp2"))
    assert report.first_wrong() == "head.weight (gradient)"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "full/2"),
        ("llama", "full:3.fsdp2.mb2.bf16"),
        ("qwen3", "keep-attention.tp2.sp"),
        ("llama", "keep-network.fsdp2.tp2.mb2"),
        ("gpt2", "redo-mlp.tp2.sp"),
        ("llama", "redo-attention.fsdp2.zero2.mb2"),
        ("qwen3", "redo-attention+mlp/2.tp2.sp.pp2.mb2"),
        ("llama", "redo-attention.cp2.ring"),
        ("gpt2", "keep-network/2.cp2.ulysses.fsdp2"),
    ],
)
def test_recompute(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


def test_recompute_within_a_budget(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages need not recompute alike: here the first does in some blocks, and the second in none."""
    monkeypatch.setitem(memory.BASE, "cpu", 1_520_000)
    config = make("gpt2", "pp2.mb1.fit2m", checkpoint={"asynchronous": False})
    parts = [memory.fitted(config, stage, "cpu").layout.recompute for stage in stages(config.model, config.layout)]
    assert parts == ["full:1", "none"]
    right(compared(config))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_recomputed_and_compiled(compared: Compared) -> None:
    right(compared(make("llama", "redo-mlp/2.compile")))


@pytest.mark.parametrize(
    ("model", "layout", "kind"),
    [("gpt2", "single", "adamw"), ("llama", "fsdp2.tp2.bf16", "adamw"), ("qwen3", "dp2.pp2.mb2", "muon")],
)
def test_offloaded_optimizer(model: str, layout: str, kind: str, compared: Compared) -> None:
    """On a CPU it is other memory of the same kind: the copies are made as on a GPU."""
    right(compared(make(model, layout, optimizer={"lr": 1e-3, "kind": kind, "offload": True})))


def test_gradients_that_are_not_brought_down(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("llama", "single", optimizer={"lr": 1e-3, "offload": True})
    monkeypatch.setattr(optimizer.Optimizer, "_copy_down", lambda self, gradients: None)
    assert compared(config).first_wrong() == "embed.weight (update)"
