"""Losses and gradients that are not finite: which samples of a step are to blame."""

from __future__ import annotations

import torch
import torch.distributed as dist

from weft.parallel.woven import Rows
from weft.train.step import Found
from weft.train.training import Training


def culprits(training: Training, rows: Rows, first_sample: int) -> list[int]:
    """Numbers of the samples of a step whose own loss is not finite, found by running them one by one.

    Every process calls this with its rows of the step, and gets the whole answer. Empty: each loss is finite alone, and
    it was the gradient that was not.
    """
    config = training.config
    bad = torch.zeros(config.train.global_batch, device=training.mesh.device)
    for place, row in zip(training.rows, rows.split(1), strict=True):
        loss = training.woven.eval_pass(row, micro_batch=1)
        bad[place] = float(not torch.isfinite(loss))
    dist.all_reduce(bad)
    return [first_sample + place for place in bad.nonzero().flatten().tolist()]


def describe(step: int, found: Found, samples: list[int], first_sample: int, global_batch: int) -> str:
    """What went wrong at a step, in a sentence."""
    where = f"step {step}, samples {first_sample} to {first_sample + global_batch - 1}"
    if samples:
        shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        return f"{where}: the loss is {found.loss}, because of sample{'s' * (len(samples) > 1)} {shown}"
    return f"{where}: gradient norm {found.grad_norm}, though each sample's loss is finite: the gradient overflows"
