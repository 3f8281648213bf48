"""What saves memory computes what one process computes without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Compared, against_one_process, losses, make, run_forked
from test_parity import right
from torch.distributed.fsdp import FSDPModule, fully_shard

from weft.parallel import loss, offload
from weft.parallel.shard import _groups
from weft.plan.memory import moments as memory
from weft.plan.memory.stage import stages
from weft.train import eightbit, optimizer
from weft.train.profiling import held
from weft.train.training import build


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
        ("mixtral", "redo-experts.fsdp2.ep2"),
        ("mixtral", "redo-attention+experts/2.tp2.sp.ep2.etp1.pp2.mb2"),
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
    right(compared(make("llama", "mb4.redo-mlp/2.compile")))


@pytest.mark.parametrize(
    ("model", "layout", "kind"),
    [
        ("gpt2", "offloadoptimizer", "adamw"),
        ("llama", "fsdp2.tp2.offloadoptimizer.bf16", "adamw"),
        ("qwen3", "dp2.pp2.mb2.offloadoptimizer", "muon"),
    ],
)
def test_offloaded_optimizer(model: str, layout: str, kind: str, compared: Compared) -> None:
    """On a CPU it is other memory of the same kind: the copies are made as on a GPU."""
    right(compared(make(model, layout, optimizer={"lr": 1e-3, "kind": kind})))


@pytest.mark.parametrize(
    ("model", "layout", "kind"),
    [
        ("gpt2", "offloadweights.bf16", "adamw"),
        ("llama", "fsdp2.mb2.offloadweights", "adamw"),
        ("qwen3", "dp2.fsdp2.zero1.mb2.offloadweights", "muon"),
        ("mixtral", "fsdp2.ep2.offloadweights", "adamw"),
    ],
)
def test_offloaded_weights(model: str, layout: str, kind: str, compared: Compared) -> None:
    """On a CPU what goes up and down stays where it is; all else is done as on a GPU."""
    right(compared(make(model, layout, optimizer={"lr": 1e-3, "kind": kind})))


def test_every_offloaded_weight_is_the_cpus() -> None:
    """Experts', blocks' and the rest's: a share that is left on the device would not be noticed but by its memory."""

    def work(rank: int) -> None:
        woven = build(make("mixtral", "fsdp2.offloadweights"), torch.device("cpu")).woven
        states = [fully_shard.state(m) for m in woven.chunks[0].model.modules() if isinstance(m, FSDPModule)]
        away = [weight.offload_to_cpu for state in states for group in _groups(state) for weight in group.fsdp_params]
        assert len(away) == len(woven.weights)
        assert all(away)

    run_forked(2, work)


def test_gradients_that_are_not_brought_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("llama", "offloadoptimizer", optimizer={"lr": 1e-3})
    monkeypatch.setattr(optimizer.Optimizer, "_copy_down", lambda self, gradients: None)
    assert against_one_process(config, tmp_path, steps=1).first_wrong() == "embed.weight (update)"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "dp2.mb2"),
        ("llama", "dp2.fsdp2.zero1.mb2"),
        ("qwen3", "tp2.sp.pp2.zbh1"),
        ("llama", "fsdp2.cp2"),
        ("mixtral", "fsdp2.ep2.mb2"),
    ],
)
def test_gradients_in_bf16(model: str, layout: str, compared: Compared) -> None:
    """The reference adds up and reduces in fp32: the difference is within the bounds of bf16. Each token goes to every
    expert: rounding could send it to another one."""
    every = {"experts": {"num_experts": 4, "per_token": 4}} if model == "mixtral" else {}
    right(compared(make(model, f"{layout}.bf16.bf16grads", model=every)))


def by_8bit(model: str, layout: str, **over: Any) -> Any:
    return make(model, layout, optimizer={"lr": 1e-3, "states": "8bit", **over})


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "dp2"),
        ("llama", "fsdp2.mb2"),
        ("qwen3", "tp2.sp.pp2"),
        ("gpt2", "fsdp2.zero1.tp2.bf16"),
        ("mixtral", "fsdp2.ep2"),
        ("llama", "cp2.ring"),
    ],
)
def test_8bit_moments(model: str, layout: str, compared: Compared) -> None:
    right(compared(by_8bit(model, layout)))


def test_8bit_moments_beside_muon(compared: Compared) -> None:
    right(compared(by_8bit("llama", "fsdp2", kind="muon")))


def test_8bit_moments_that_are_lost_are_found(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    compared(by_8bit("llama", "single"))
    monkeypatch.setattr(eightbit.Moment, "write", lambda self, start, x: None)
    report = compared(by_8bit("llama", "fsdp2"))
    assert report.first_wrong() == "embed.weight (update)"
    assert all(d.right for d in report.differences if d.kind == "update" and d.step == 1)


@pytest.mark.parametrize(
    ("layout", "over"),
    [
        ("single", {}),
        ("single", {"kind": "muon"}),
        ("single", {"states": "8bit"}),
        ("single", {"kind": "muon", "states": "8bit"}),
        ("offloadoptimizer", {}),
        ("fsdp2.offloadoptimizer", {"kind": "muon"}),
    ],
)
def test_what_a_profile_says_an_optimizer_holds_is_what_is_planned(layout: str, over: dict[str, str]) -> None:
    config = make("llama", layout, optimizer=over)
    (stage,) = stages(config.model, config.layout)
    planned = memory.optimizer_bytes(config, stage, "cpu")

    def look(rank: int) -> None:
        kept = held(build(config, torch.device("cpu")))["optimizer"]
        assert rank > 0 or kept == pytest.approx(planned, rel=0.02 if "states" in over else 0)  # 8 bits: whole blocks
        assert kept == pytest.approx(planned, rel=0.02)  # a later process may have a row less

    run_forked(config.layout.world, look)


def test_8bit_moments_learn_as_well(tmp_path: Path) -> None:
    """50 steps in which the loss falls by more than half: within 2 % of fp32 moments at each of them."""
    plain, coarse = (
        losses(make("llama", "single", optimizer={"states": states}), tmp_path) for states in ("fp32", "8bit")
    )
    assert plain[-1] < plain[0] / 2
    assert plain != coarse
    assert max(abs(a / b - 1) for a, b in zip(plain, coarse, strict=True)) < 0.02


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "offload.mb4"),
        ("llama", "offload.fsdp2.zero1.mb2.bf16"),
        ("qwen3", "offload.tp2.sp.full"),
        ("llama", "offload.fsdp2.tp2.redo-mlp"),
        ("gpt2", "offload.pp2.mb2.selective"),
        ("llama", "offload.pp2.zbv.fsdp2"),
        ("llama", "offload.cp2.ring.dp2"),
        ("mixtral", "offload.fsdp2.ep2"),
        ("gpt2", "offload.fp8.chunked.pp2.vp2.interleaved"),
    ],
)
def test_offloaded_activations(model: str, layout: str, compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 1)
    right(compared(make(model, layout)))


@pytest.mark.parametrize("recompute", ["none", "full/2"])
def test_offloaded_activations_change_no_bit(recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 1)
    layouts = [f"mb8.bf16{'' if recompute == 'none' else '.' + recompute}{end}" for end in ("", ".offload")]
    here, away = (losses(make("llama", layout), tmp_path, steps=5) for layout in layouts)
    assert here == away


def test_what_comes_back_too_early_is_found(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if backward did not wait for the copy."""
    compared(make("llama", "single"))
    monkeypatch.setattr(offload, "SMALL", 1)
    fetch = offload.Load._fetch

    def early(self: Any, crate: Any) -> None:
        crate.away.zero_()
        fetch(self, crate)

    monkeypatch.setattr(offload.Load, "_fetch", early)
    assert compared(make("llama", "offload")).first_wrong() == "blocks.3.mlp.down.weight (gradient)"
