"""Messages of ZeRO-3: weights that a block gathers, and gradients that it scatters. Torch-free."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from weft.plan.time import collectives
from weft.plan.time.block import parameters
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.copies import copies, weight_bytes
from weft.plan.work import Num, Work


def shard_messages(work: Work, busy: tuple[Num, Num]) -> tuple[Num, Num]:
    """ZeRO-3 gathers a block's weights forward and backward and scatters its gradients, beside its neighbour's
    computation: what that does not hide, each way."""
    c, soft = work.cut, work.software
    chip = replace(work.machine, network=work.machine.network * soft.sharded)
    parts = list(zip(copies(work), parameters(work)[:2], strict=True))
    gather, scatter = (
        sum(collectives.gather(one.shards, one.stride, chip, part * item) * (part > 0) for one, part in parts)
        for item in (weight_bytes(work), soft.reduced)
    )
    volume = sum(part * (one.shards > 1) for one, part in parts)
    shown = [
        np.maximum((1 - soft.overlap_dp) * need, need - C.fsdp_hidden * time)
        + C.contention * np.minimum(size / chip.nvlink, time)
        for need, size, time in zip(
            (gather, gather + scatter), (2 * volume, (2 + soft.reduced) * volume), busy, strict=True
        )
    ]
    forward, backward = (np.where((c.zero == 3) & (c.shards > 1), way, 0.0) for way in shown)
    return forward, backward
