"""nanotron, and the sweep that the Ultra-Scale Playbook was written from: which of two versions ran a layout.

Its rows do not name the version; only memory and time tell. What the half shows that constants are fitted to is written
here as rules, and the other half is predicted with them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from weft.plan.memory.footprint import footprint
from weft.plan.work import Software, Work

NANOTRON = Software(
    fused=0, fused_norm=1, logits=10.7, overlap_dp=0, balanced=1, keeps_gathered=1, copies=2, whole_dp=1, adds=1,
    tp_host=2.2e-3,
)  # fmt: skip
FULL = 0.97
"""Of a GPU's memory, what the first version could fill."""


def is_sweep(row: dict[str, Any]) -> bool:
    return "nanotron" in row.get("set", "")


def software(row: dict[str, Any]) -> Software:
    """As its source has it (huggingface/nanotron at 9055c664): without ZeRO, PyTorch's DDP reduces gradients in buckets
    beside the backward pass, and has them in 16 bits too; with ZeRO 1 all of them are reduced afterwards, in fp32 and to
    everyone.

    The later version gathers inputs again. Its blocks, and those of any pipeline over nodes, take a CPU as much longer as
    tp is wide; and in such a pipeline the last micro-batches in flight keep no gathered inputs, more of them the wider tp
    is.
    """
    gpus, tp, pp = row["gpus"], row.get("tp") or 1, row.get("pp") or 1
    gathers_again = pp > 1 if tp >= 32 else gpus >= 512
    kept = 0.0 if gathers_again else max(0.0, 1 - (pp > 1) * math.log2(max(2, tp)) / 2 / pp)
    wide = gathers_again or (pp > 1 and gpus > 8)
    return replace(
        NANOTRON, overlap_dp=int(not row.get("zero_stage")), gradients=4 if row.get("dp") == 1 else 6,
        keeps_gathered=kept, tp_host=2.7e-3 * tp if wide else NANOTRON.tp_host,
        stall=wait(gpus) if ran_later(row) else 0,
    )  # fmt: skip


def wait(gpus: int) -> float:
    """Seconds that a stage of the later version waits at a boundary in each micro-batch, whatever its size."""
    return 0.35 + 0.035 * math.log2(gpus)


def ran_later(row: dict[str, Any]) -> bool:
    """Whether a pipeline's stages wait: all on 512 GPUs; on fewer those under a tp of 32, those of many micro-batches
    without ZeRO, and on 256 those of many replicas."""
    gpus, tp, dp, zero = row["gpus"], row.get("tp") or 1, row.get("dp") or 1, row.get("zero_stage")
    if gpus >= 512 or tp >= 32:
        return True
    if gpus == 256 and dp >= 32:
        return dp < 128 if zero else dp >= 128
    return gpus > 8 and not zero and dp > 1 and (dp > 2 or gpus >= 64) and row.get("grad_accum", 1) >= 16


def that_fits(software: Software, work: Work) -> Software:
    """A pipeline that ran, and could not have with the first version's memory, ran with the later one."""
    gpus = int(work.cut.gpus)
    full = footprint(work, first=True).allocated > FULL * work.machine.memory
    return replace(software, stall=wait(gpus)) if full and gpus > 8 and work.cut.pp > 1 else software
