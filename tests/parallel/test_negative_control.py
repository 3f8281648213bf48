"""A proof that cannot fail proves nothing: cuts broken on purpose are caught, and the culprit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from harness import Compared, make

from weft.models import decoder
from weft.parallel import collectives, replicate, tensor, woven
from weft.train import optimizer, step


def test_missing_sum_of_norm_gradients(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Under sp each process sees its part of the sequence; without the sum over tp, a norm learns from that part alone."""
    monkeypatch.setattr(woven, "partial_gradient", lambda name, sp: False)
    report = compared(make("llama", "tp2.sp"))
    assert not report.right
    assert report.first_wrong() == "norm.weight (gradient)"


def test_missing_sum_in_one_block(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    whole = tensor.RowLinear.forward
    calls: list[int] = []

    def forward(self: Any, x: Any) -> Any:
        calls.append(1)
        third_block_attention = len(calls) % 8 == 5  # two row matrices a block
        return F.linear(x, self.weight, self.bias) if third_block_attention else whole(self, x)

    monkeypatch.setattr(tensor.RowLinear, "forward", forward)
    report = compared(make("gpt2", "tp2"))
    assert not report.right
    assert report.first_wrong() == "blocks.2.attention (forward)"


def test_broken_tie(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """What stock parallelize_module does in silence: each module gets a parameter of its own."""
    compared(make("gpt2", "single"))  # the reference, made before anything is broken
    monkeypatch.setattr(decoder.Decoder, "tie", lambda self: None)
    report = compared(make("gpt2", "tp2"))
    assert not report.right
    assert report.first_wrong() == "embed.weight (gradient)"


def test_replicas_that_do_not_agree(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    monkeypatch.setattr(replicate.Replicas, "_arrived", lambda self, index: self.waiting.__setitem__(index, 0))
    report = compared(make("llama", "dp2"))
    assert not report.right
    assert report.worst("gradient")[0].error > 0.1


def test_backward_without_sum(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    monkeypatch.setattr(collectives.CopyToAxis, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    report = compared(make("llama", "tp2"))
    assert report.first_wrong() == "norm.weight (gradient)"


def test_norm_of_a_share(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Each process's own gradients are a part of the whole: clipped by their norm, the step would be too long."""
    compared(make("llama", "single"))
    whole = step.squared_norm
    monkeypatch.setattr(step, "squared_norm", lambda weights: whole(weights) / 2)
    report = compared(make("llama", "fsdp2"))
    assert report.first_wrong() == "norm"


def test_wrong_update(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    compared(make("llama", "single"))
    made = optimizer.Optimizer.__init__

    def init(self: Any, weights: Any, config: Any, mesh: Any, **rest: Any) -> None:
        made(self, weights, config.model_copy(update={"weight_decay": 0.5}), mesh, **rest)

    monkeypatch.setattr(optimizer.Optimizer, "__init__", init)
    report = compared(make("llama", "fsdp2"))
    assert report.first_wrong() == "embed.weight (update)"


def test_a_mean_of_means(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Each replica divides by its own number of targets, times the replicas: right only where all have as many."""
    compared(make("llama", "single"))
    whole = step.agree

    def agree(woven: Any, num_targets: Any, *flags: float) -> tuple[float, ...]:
        _, *rest = whole(woven, num_targets, *flags)
        return float(num_targets) * woven.layout.replicas, *rest

    monkeypatch.setattr(step, "agree", agree)
    report = compared(make("llama", "dp2"))
    assert report.first_wrong() == "head.weight (gradient)"


def test_a_replica_without_the_last_update(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """No later step is there to show it."""
    compared(make("llama", "single"))
    update, calls = optimizer.Optimizer.step, []

    def skipped(self: Any, lr: float) -> None:
        calls.append(lr)
        if dist.get_rank() == 0 or len(calls) == 1:
            update(self, lr)

    monkeypatch.setattr(optimizer.Optimizer, "step", skipped)
    report = compared(make("llama", "dp2"))
    assert report.first_wrong() == "embed.weight (copy)"
    assert {found.step for found in report.differences if not found.right} == {2}


def test_a_replica_with_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Named by what is wrong first, not by the gradients of the next step."""
    compared(make("llama", "single"))
    update = optimizer.Optimizer.step
    monkeypatch.setattr(optimizer.Optimizer, "step", lambda self, lr: update(self, lr / (1 + dist.get_rank())))
    report = compared(make("llama", "dp2"))
    assert report.first_wrong() == "embed.weight (copy)"


def test_biases_that_one_process_does_not_move(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    compared(make("deepseek", "single"))
    move = step.move_biases
    monkeypatch.setattr(step, "move_biases", lambda woven, *rest: move(woven, *rest) if dist.get_rank() == 0 else None)
    report = compared(make("deepseek", "dp2"))
    assert report.first_wrong() == "blocks.1.mlp.router.bias (copy)"


def test_biases_that_nobody_moves(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    right = compared(make("deepseek", "fsdp2.ep2", train={"steps": 1}))
    assert right.right
    assert right.worst("bias")
    monkeypatch.setattr(step, "move_biases", lambda *arguments: None)
    report = compared(make("deepseek", "fsdp2.ep2", train={"steps": 1}))
    assert not report.right
    assert report.worst("bias")[0].error > 0.9
