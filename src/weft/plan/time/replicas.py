"""What replicas of weights send each other in a step: gradients, and the weights that are made of them. Torch-free."""

from __future__ import annotations

import numpy as np

from weft.plan.time import collectives
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.copies import Copies, copies, weight_bytes
from weft.plan.work import Num, Work


def replica_messages(work: Work, spans: tuple[Num, Num]) -> Num:
    """Seconds of a step that nothing hides. Gradients are reduced beside the last backward pass, and weights gathered
    beside the first forward pass.

    Args:
        spans: seconds of a block with one micro-batch, forward and backward, beside which messages may go.
    """
    c, chip, soft = work.cut, work.machine, work.software
    zero1, both = (c.zero == 1) | (c.zero == 2), copies(work)
    # seconds of what is there, each way, and the share of it that goes at once
    parts = [tuple(np.where(one.weights > 0, seconds, 0.0) for seconds in replica_part(work, one)) for one in both]
    shares = [at_once(work, one) for one in both]
    reduction, spread = (sum(part[way] for part in parts) for way in (0, 1))
    # nothing is left to hide those that are ready last, and those that the first block waits for
    late, awaited = (sum(share * part[way] for share, part in zip(shares, parts, strict=True)) for way in (0, 1))
    # interleaved, a chunk's gradients are whole while the other chunks still have a round to do
    rounds = np.where(c.vp > 1, np.maximum(1.0, np.minimum(work.micro_batches, c.pp) * (c.vp - 1) / c.vp), 1.0)
    first, last = (rounds * work.blocks * seconds * C.dp_hidden for seconds in spans)
    beside = np.where(zero1, first, np.maximum(0, last - reduction))
    shown = np.maximum(0.0, reduction - np.maximum(late, last))
    shown = shown + np.maximum(0.0, spread - np.maximum(awaited, np.where(soft.overlap_dp == 1, beside, 0.0)))
    moved = sum(one.here(c.zero == 3) * (one.ways(c.zero) > 1) for one in both)
    slowed = C.contention * moved * 2 * soft.reduced / chip.nvlink
    seconds = np.where(soft.overlap_dp > 0, shown + late + awaited + slowed, reduction + spread)
    return seconds + early_reductions(work, spans[1]) + zero1 * (c.shards > 1) * soft.turns * c.shards


def at_once(work: Work, one: Copies) -> Num:
    """Share of these weights whose gradients are reduced at a time: a block's, or a bucket's. Megatron's of the first
    stage's first chunk are cut so, which is the last to be ready and the first to be needed; all others go at once
    (megatron/core/distributed/distributed_data_parallel.py)."""
    c, soft = work.cut, work.software
    bucket = np.maximum(soft.bucket, soft.bucket_each * one.shards * one.replicas)
    part = np.minimum(1 / c.vp, bucket / np.maximum(1, one.weights))
    return np.where(bucket > 0, part, 1 / np.maximum(1, work.blocks))


def replica_part(work: Work, one: Copies) -> tuple[Num, Num]:
    """Seconds in which gradients of these weights are reduced, and in which all get them, or the weights made of them."""
    c, chip, soft = work.cut, work.machine, work.software
    ways, mine = one.ways(c.zero), one.here(c.zero == 3)
    stride = one.stride * np.where(c.zero == 3, one.shards, 1)
    zero1 = (c.zero == 1) | (c.zero == 2)
    scattered = collectives.gather(ways, stride, chip, mine * soft.reduced) * (1 + soft.whole_dp)
    reduction = np.where(zero1, scattered, collectives.reduce(ways, stride, chip, mine * soft.reduced) / 2)
    # where a part of the replicas shares the states, these gather among themselves, and gradients go round the rest
    among = np.where(zero1 & (one.replicas > 1), one.shards, ways)
    gathered = collectives.gather(among, stride, chip, weight_bytes(work) * one.weights)
    around = collectives.gather(one.replicas, stride * one.shards, chip, one.weights / one.shards * soft.reduced)
    return reduction, np.where(zero1, gathered + around, reduction)


def early_reductions(work: Work, backward: Num) -> Num:
    """Seconds of the passes before the last: under ZeRO 2 a process has room for its own share of the gradients alone, and
    those that share a weight reduce them in every pass."""
    c, chip, soft, both = work.cut, work.machine, work.software, copies(work)
    volume = sum(one.weights * soft.reduced * (one.shards > 1) for one in both)
    scattered = (1 + soft.whole_dp) * sum(
        collectives.gather(one.shards, one.stride, chip, one.weights * soft.reduced) * (one.weights > 0) for one in both
    )
    shown = np.maximum(0.0, scattered - work.blocks * backward * C.dp_hidden)
    shown = shown + scattered / np.maximum(1, work.blocks) + C.contention * volume / chip.nvlink
    passes = (c.zero == 2) * (1 - soft.once) * (work.micro_batches - 1)
    return passes * np.where(soft.overlap_dp > 0, shown, scattered)
