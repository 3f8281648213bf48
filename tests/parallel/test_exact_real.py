"""An imagined process against a real one: the same step, on real tensors, by two processes that talk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import run_forked
from torch import Tensor

from weft.config.load import make_config
from weft.config.tree import Config
from weft.exact.rank import Exact, imagine_rank, watch_step
from weft.models.moe import Router

LLAMA = {
    "family": "llama", "num_layers": 2, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 160, "vocab": 1000,
    "max_seq": 64,
}  # fmt: skip
DEEP = {**LLAMA, "num_layers": 4}
"""Two stages for each of two processes."""
MIXTURE = {**LLAMA, "family": "mixtral", "ffn": 96, "experts": {"num_experts": 4, "per_token": 2}}
CASES = {
    "dp2.mb2": LLAMA, "fsdp2.bf16.mb1": LLAMA, "fsdp2.zero1.mb2.full": LLAMA, "tp2.sp": LLAMA, "tp2.chunked": LLAMA,
    "tp2.sp.selective": LLAMA,
    "pp2.mb1": LLAMA, "pp2.zbv.mb2": DEEP, "cp2.ring": LLAMA, "cp2.ulysses.offload": LLAMA, "dp2.ep2": MIXTURE,
}  # fmt: skip


def config(layout: str) -> Config:
    sizes = {"global_batch": 8, "seq": 64, "device": "cpu"}
    return make_config({"model": CASES[layout], "layout": layout, "train": sizes})


def in_turn(router: Router, scores: Tensor) -> Tensor:
    """Each expert gets as many tokens as any other, as is imagined."""
    pairs = torch.arange(scores.shape[:-1].numel() * router.experts.per_token)
    return (pairs % router.experts.num_experts).view(*scores.shape[:-1], -1)


def told(exact: Exact) -> dict:
    at_peak = exact.at_peak()
    return {
        "parameters": exact.parameters,
        "peak": exact.ledger.peak,
        "fixed": [at_peak["weights"], at_peak["optimizer"]],
        "flops": {name: round(flops) for name, flops in sorted(exact.flops.items())},
        "messages": sorted([line.kind, line.axis, line.size, line.count, line.bytes] for line in exact.messages),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes saw of each case. One pair of processes does them all."""
    folder = tmp_path_factory.mktemp("measured")

    def work(rank: int) -> None:
        Router.choose = in_turn  # type: ignore[method-assign]
        for layout in CASES:
            found = told(watch_step(config(layout), rank, "cpu"))
            # gloo's threads let go of what FSDP gathers when they come to it, now and then too late to count
            for _ in range(4 if "fsdp" in layout else 0):
                found["peak"] = min(found["peak"], told(watch_step(config(layout), rank, "cpu"))["peak"])
            (folder / f"{layout}-{rank}.json").write_text(json.dumps(found))

    run_forked(2, work)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", CASES)
def test_what_is_imagined_is_what_happens(layout: str, rank: int, measured: Path) -> None:
    real = json.loads((measured / f"{layout}-{rank}.json").read_text())
    imagined = told(imagine_rank(config(layout), rank, "cpu"))
    # when a message has left is a matter of time: of what is to be sent, some is held for longer
    waiting = sum(size for kind, *_, size in real["messages"] if kind == "send")
    peak = imagined.pop("peak")
    assert peak * 0.998 <= real.pop("peak") <= peak * 1.002 + waiting
    assert imagined == real
