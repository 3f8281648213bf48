"""The order in which a pipeline stage works through its micro-batches. Torch-free."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Op(NamedTuple):
    """Forward (F) or backward (B) of one micro-batch."""

    kind: Literal["F", "B"]
    micro_batch: int


def stage_ops(schedule: str, stage: int, num_stages: int, num_micro_batches: int) -> list[Op]:
    """What one stage does, in order.

    gpipe: every forward, then every backward (Huang et al., 2019). 1f1b: just enough forwards to fill the pipeline, then
    one of each in turn, so that at most `num_stages` activations are held (Narayanan et al., PipeDream, 2019).
    """
    forwards = [Op("F", index) for index in range(num_micro_batches)]
    backwards = [Op("B", index) for index in range(num_micro_batches)]
    ahead = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, num_stages - stage - 1)
    steady = [op for pair in zip(forwards[ahead:], backwards, strict=False) for op in pair]
    return forwards[:ahead] + steady + backwards[num_micro_batches - ahead :]
