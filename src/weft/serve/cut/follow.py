"""A process that serves a model with others and is not the first: it computes what that says."""

from __future__ import annotations

from pathlib import Path

from weft.serve.config import EngineConfig
from weft.serve.cut.ranks import Order, Ranks, join, rank_device
from weft.serve.cut.share import load_share
from weft.serve.steps.batch import Batch
from weft.serve.steps.device import pick_dtype
from weft.serve.steps.runner import Runner, num_blocks


def main(folder: str, store: str, index: int, config: EngineConfig) -> None:
    """Compute what the first process says, until it says that it is over, or is gone."""
    ranks = join(Path(store), index, config)
    device = rank_device(config, index)
    model = load_share(Path(folder), ranks, device, pick_dtype(config.dtype, device))
    max_context = min(config.max_context or model.shape.max_seq, model.shape.max_seq)
    blocks = ranks.least(num_blocks(model, config, max_context))
    follow(Runner(model, blocks, config, ranks), ranks)
    ranks.leave()


def follow(runner: Runner, ranks: Ranks) -> None:
    """Compute what the first process says, until it says that it is over."""
    while True:
        order, row = ranks.receive()
        if order == Order.END:
            return
        if order == Order.EMBED:
            runner.embed(row[1:].tolist(), int(row[0]))
        else:
            for _ in runner.run(Batch.unpack(row)):
                pass
