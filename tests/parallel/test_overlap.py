"""What travels while something else is worked out: the order of events. That results are right is proved elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Compared, make, run_forked
from test_parity import right
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from weft.parallel import flight, shard
from weft.parallel.experts import DealtExperts, Journey
from weft.train.step import find_gradients
from weft.train.training import build
from weft.verify.trace import step_rows

THERE = ["depart", "depart", "gate", "up", "arrive", "arrive"]  # rows, and what each weighs
BACK = ["depart", "down", "arrive"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled in the processes that a test forks, each its own."""
    found: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            found.append(name)
            y = function(*arguments)
            if name == "experts" and y.requires_grad:
                y.register_hook(lambda grad: found.append(name))
            return y

        return call

    monkeypatch.setattr(flight, "begin", noted("depart", flight.begin))
    monkeypatch.setattr(flight, "end", noted("arrive", flight.end))
    monkeypatch.setattr(DealtExperts, "compute", noted("experts", DealtExperts.compute))
    return found


@pytest.mark.parametrize("layout", ["dp2.ep2.mb8", "fsdp2.ep2.bf16", "tp2.sp.ep2.etp1", "tp2.ep2.etp1"])
def test_shared_experts_work_while_tokens_travel(layout: str, events: list[str]) -> None:
    config = make("deepseek", layout, model={"num_layers": 2})  # the first block is dense

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        shared = training.woven.modules()["blocks.1.mlp.shared"]
        for name in ("gate", "up", "down"):

            def note(module: Any, args: Any, y: Tensor, name: str = name) -> None:
                events.append(name)
                y.register_hook(lambda grad: events.append(name))

            shared.get_submodule(name).register_forward_hook(note)
        find_gradients(training.woven, training.scaler, step_rows(training, None, 1))
        forward, backward = events[: len(events) // 2], events[len(events) // 2 :]
        assert forward == [*THERE, "experts", *BACK]
        assert backward[:6] == ["depart", "down", "arrive", "experts", "depart", "depart"]
        assert sorted(backward[6:8]) == ["gate", "up"]
        assert backward[8:] == ["arrive", "arrive"]

    run_forked(config.layout.world, work)


@pytest.mark.parametrize("layout", ["dp2.ep2.full", "fsdp2.ep2.selective", "tp2.sp.ep2.etp1.redo-mlp"])
def test_recomputation_leaves_no_message_on_its_way(layout: str, events: list[str]) -> None:
    config = make("deepseek", layout, model={"num_layers": 2})

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        find_gradients(training.woven, training.scaler, step_rows(training, None, 1))
        assert events.count("depart") == events.count("arrive") > 0

    run_forked(config.layout.world, work)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_block_is_gathered_before_the_host_waits(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gather that FSDP2 asks for, and each time that the host learns how many tokens travel."""
    config = make("mixtral", "fsdp4.ep2.bf16")
    events: list[str] = []
    gather, plan = _fsdp_param_group.foreach_all_gather, Journey.plan

    def noted_gather(*args: Any, **kwargs: Any) -> Any:
        events.append("gather")
        return gather(*args, **kwargs)

    def noted_plan(*args: Any) -> Journey:
        events.append("wait")
        return plan(*args)

    monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", noted_gather)
    monkeypatch.setattr(Journey, "plan", noted_plan)
    if not ahead:
        monkeypatch.setattr(shard, "gather_ahead", lambda blocks: None)

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        find_gradients(training.woven, training.scaler, step_rows(training, None, 1))
        forward = " ".join(events).split("wait")[:4]
        block = 2  # its own weights, and its experts'
        root = 1
        own = [root + 2 * block, block, block, 0] if ahead else [root + block, block, block, block]
        assert [part.count("gather") for part in forward] == own

    run_forked(4, work)


WIDE = {"hidden": 256, "num_heads": 4, "num_kv_heads": 4, "ffn": 512, "num_layers": 2, "vocab": 67}
"""A model of 3.4 MiB."""


@pytest.mark.parametrize(("mebibytes", "count"), [(1, 5), (32, 1)])
def test_replicas_send_buckets_of_the_size_that_is_set(mebibytes: int, count: int) -> None:
    config = make("llama", "dp2", model=WIDE, train={"bucket_mib": mebibytes})

    def work(rank: int) -> None:
        [chunk] = build(config, torch.device("cpu")).woven.chunks.values()
        sizes = [bucket.nbytes for bucket in chunk.replicas[0].buckets]
        assert sum(sizes) == 4 * config.model.num_params
        assert len(sizes) == count, sizes
        assert all(size <= mebibytes * 2**20 for size in sizes)

    run_forked(2, work)


def test_small_buckets_add_up_the_same(compared: Compared) -> None:
    right(compared(make("llama", "dp2.mb2", model=WIDE, train={"bucket_mib": 1})))
