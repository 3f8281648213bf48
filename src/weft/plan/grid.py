"""The candidates of a search, as columns: every value of every axis that may go together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.machine import Cluster
from weft.plan.numbers import Job, flying, put_off
from weft.plan.work import Cut, Num

KINDS = ("dp", "zero1", "zero2", "fsdp", "hsdp")
"""How replicas hold the states: whole; ZeRO 1, 2, 3 over all; ZeRO 3 in a node with copies over nodes."""
SCHEDULES = ("1f1b", "interleaved", "zbh1", "zbv", "dualpipev", "bfs")
RECOMPUTES = ("none", "selective", "full/4", "full/2", "full", "redo-mlp", "redo-experts")
CP_KINDS = ("ring", "allgather", "ulysses")
LOSSES = ("whole", "chunked")
OFFLOADS = ("off", "activations", "weights", "optimizer")
AXES = (
    "tp", "sp", "cp", "cp_kind", "pp", "vp", "schedule", "ep", "etp", "kind", "micro_batch", "recompute", "offload",
    "loss",
)  # fmt: skip
"""What a candidate is made of, a column each; gpus do the rest."""
LOOPED = ("interleaved", "bfs")
OTHER = -1
"""A value of a layout's that no candidate has: recompute full/3, a schedule of one's own."""
SAVINGS = ("recompute", "offload", "loss")


def grid(shape: Shape, job: Job, cluster: Cluster, fixed: dict[str, int]) -> dict[str, Num]:
    """Candidates as columns: the coarse axes are tried one by one, the fine ones are multiplied out."""
    gpus, experts = cluster.gpus, shape.experts
    tps = [
        tp for tp in _divisors(gpus, min(64, cluster.nvlink_domain))
        if not (shape.num_heads % tp or shape.num_kv_heads % tp or shape.ffn % tp)
    ]  # fmt: skip
    cps = [cp for cp in _divisors(gpus, max(1, job.seq // 2048)) if cp == 1 or job.seq % (2 * cp) == 0]
    pps = _divisors(gpus, min(shape.num_layers, 64))
    eps = _divisors(experts.num_experts, gpus) if experts else [1]
    tables = []
    for tp, cp, pp in product(tps, cps, pps):
        replicas, rest = divmod(gpus, tp * cp * pp)
        if rest or not replicas or job.global_batch % replicas:
            continue
        local = job.global_batch // replicas
        batches = [size for size in _divisors(local, 64) if pp == 1 or local // size >= pp]
        kinds = [0] if replicas == 1 else [0, 1, 2, 3] + [4] * (replicas > cluster.nvlink_domain // (tp * cp) > 1)
        ways = [0, 1] + [2] * (shape.num_kv_heads // tp % cp == 0) if cp > 1 else [0]
        etps = [1, tp] if experts and tp > 1 and experts.ffn % (tp * 1024) == 0 else [1]  # thinner parts are only slow
        even = tp > 1 and job.seq % (cp * tp) == 0
        sps = [0] * (tp == 1 or not experts) + [1] * even
        turns = np.array(_turns(shape, pp))
        table = _product(
            [tp], sps, [cp], ways, [pp], range(len(turns)), [ep for ep in eps if ep <= replicas * cp * tp], etps, kinds,
            batches, (0, 1, 4),
        )  # fmt: skip
        turn, counts, kind = turns[table[:, 5]], local // table[:, 9], table[:, 8]
        schedule = turn[:, 1]
        # interleaved wants rounds of pp; dualpipev two micro-batches a process; the split ones, weights that are whole
        wrong = (schedule == 1) & (counts % pp > 0) | (schedule == 5) & (counts % pp == 0)
        wrong |= (schedule == 4) & (counts < 2 * pp) | np.isin(schedule, (2, 3, 4)) & (kind >= 3)
        # experts are dealt out over all that share weights, or over these and a part of the copies
        node = np.gcd(replicas, max(1, cluster.nvlink_domain // (tp * cp)))
        inner = cp * tp * np.select([kind == 0, kind == 4], [1, node], replicas)
        dealt = table[:, 6] * (table[:, 7] if experts else 1)
        wrong |= (replicas * cp * tp % dealt > 0) | (inner % dealt > 0) & (dealt % inner > 0)
        tables.append(
            np.column_stack([table[:, :5], turn, table[:, 6:], np.zeros((len(table), 2), dtype=np.int64)])[~wrong]
        )
    table = np.concatenate(tables) if tables else np.empty((0, len(AXES)), dtype=np.int64)
    columns = {axis: table[:, index] for index, axis in enumerate(AXES)}
    return settled(columns, {axis: value for axis, value in fixed.items() if axis not in SAVINGS})


def _divisors(number: int, most: int) -> list[int]:
    return [part for part in range(1, min(number, most) + 1) if number % part == 0]


def row_of(layout: Layout, shape: Shape, job: Job) -> dict[str, int]:
    """A layout as a candidate's row, as near as one comes."""
    kind = "dp" if layout.fsdp == 1 else {1: "zero1", 2: "zero2"}.get(layout.zero, "hsdp" if layout.dp > 1 else "fsdp")
    held = {"activations": layout.offload, "weights": layout.offload_weights, "optimizer": layout.offload_optimizer}
    offload = " and ".join(name for name, away in held.items() if away) or "off"
    cp_kind = layout.cp_kind if layout.cp > 1 else CP_KINDS[0]
    schedule = layout.schedule if layout.pp > 1 else SCHEDULES[0]
    words = {
        "cp_kind": (CP_KINDS, cp_kind), "schedule": (SCHEDULES, schedule), "kind": (KINDS, kind),
        "recompute": (RECOMPUTES, layout.recompute), "offload": (OFFLOADS, offload), "loss": (LOSSES, layout.loss),
    }  # fmt: skip
    numbers = {
        "tp": layout.tp, "sp": layout.sp, "cp": layout.cp, "pp": layout.pp, "vp": layout.num_chunks, "ep": layout.ep,
        "etp": layout.expert_tp if shape.experts else 1, "micro_batch": layout.micro_batch_size(job.global_batch),
    }  # fmt: skip
    row = numbers | {axis: names.index(word) if word in names else OTHER for axis, (names, word) in words.items()}
    return {axis: int(row[axis]) for axis in AXES}


def settled(columns: dict[str, Num], fixed: dict[str, int]) -> dict[str, Num]:
    """Of all candidates, those with these values."""
    kept = np.all([columns[axis] == value for axis, value in fixed.items()] or [columns["tp"] > 0], axis=0)
    return {axis: column[kept] for axis, column in columns.items()}


def with_savings(columns: dict[str, Num], full: Num, nearly: Num, gpus: int, experts: bool) -> dict[str, Num]:
    """With finer ways to save memory, where it does not suffice (`full`): some blocks or their parts computed again,
    activations or weights on the CPU, the loss in chunks; and where no more is missing than the optimizer takes (`nearly`),
    that."""
    plain, selective = (np.flatnonzero(full & (columns["recompute"] == kind)) for kind in (0, 1))
    fsdp = (columns["kind"] >= 3) | (columns["tp"] * columns["cp"] * columns["pp"] == gpus)  # or over one process
    parts = [columns]
    for index, changes in [
        (plain, {"recompute": 2}), (plain, {"recompute": 3}), (plain, {"recompute": 6 if experts else 5}),
        (plain, {"offload": 1}), (selective, {"offload": 1}), (np.flatnonzero(full), {"loss": 1}),
        (plain, {"recompute": 3, "loss": 1}), (np.flatnonzero(full & fsdp), {"offload": 2}),
        (np.flatnonzero(nearly), {"offload": 3}),
    ]:  # fmt: skip
        some = {axis: column[index] for axis, column in columns.items()}
        parts.append(some | {axis: np.full(len(index), value) for axis, value in changes.items()})
    return {axis: np.concatenate([part[axis] for part in parts]) for axis in AXES}


def _turns(shape: Shape, pp: int) -> list[tuple[int, int]]:
    """Stages of each process, and the schedule's index."""
    if pp == 1:
        return [(1, 0)]
    turns = [(1, 0), (1, 2)]
    loops = [(2, 3), (2, 4)] + [(vp, 1) for vp in (2, 3, 4, 5, 6, 8, 12, 16)] + [(2, 5), (4, 5)]
    even = 1.15 * shape.num_layers / pp  # stages that are much longer than others are only slow
    return turns + [
        (vp, index)
        for vp, index in loops
        if vp * pp <= shape.num_layers and vp * -(-shape.num_layers // (vp * pp)) <= even
    ]


def _product(*axes: Iterable[int]) -> Num:
    """All combinations, one a row."""
    return np.stack(
        np.meshgrid(*(np.array(list(axis), dtype=np.int64) for axis in axes), indexing="ij"), axis=-1
    ).reshape(-1, len(axes))


def cut_of(shape: Shape, columns: dict[str, Num], job: Job, cluster: Cluster) -> Cut:
    tp, cp, pp, kind = (columns[name] for name in ("tp", "cp", "pp", "kind"))
    replicas = cluster.gpus // (tp * cp * pp)
    node = np.gcd(replicas, np.maximum(1, cluster.nvlink_domain // (tp * cp)))
    fsdp = np.where(kind == 0, 1, np.where(kind == 4, node, replicas))
    schedule, vp, redone = columns["schedule"], columns["vp"], columns["recompute"]
    which = [schedule == index for index in range(len(SCHEDULES))]
    kept = np.select(which, [flying(name, pp, vp) for name in SCHEDULES])
    waiting = np.select(which, [put_off(name, pp) for name in SCHEDULES])
    every = np.array([0, 0, 4, 2, 1, 0, 0])[redone]
    stage = -(-shape.num_layers // (pp * vp))  # blocks of the largest
    full = np.where(every > 0, -(-stage // np.maximum(1, every)) / stage, 0.0)
    return Cut(
        dp=replicas // fsdp, fsdp=fsdp, zero=np.where(fsdp > 1, np.array([0, 1, 2, 3, 3])[kind], 0), tp=tp,
        sp=columns["sp"], cp=cp, gathers=(columns["cp_kind"] == 1) * 1.0, pp=pp, vp=vp, ep=columns["ep"],
        etp=columns["etp"], micro_batch=columns["micro_batch"], full=full, every=np.maximum(1, every),
        selective=(redone == 1) * 1.0,
        redo_mlp=(redone == 5) * 1.0, redo_experts=(redone == 6) * 1.0,
        chunked=columns["loss"] * 1.0, item=2, fp8=float(job.matmul == "fp8"), flying=kept,
        put_off=waiting, dual=(schedule == 4) * 1.0,
        ulysses=(columns["cp_kind"] == 2) * 1.0, offload=(columns["offload"] == 1) * 1.0,
        away=(columns["offload"] == 2) * 1.0, moments_away=(columns["offload"] == 3) * 1.0,
    )  # fmt: skip
