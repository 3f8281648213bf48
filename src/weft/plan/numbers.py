"""Shape, Layout, Cluster and Job as the plain numbers that the models work with. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from weft.config.layout import Layout
from weft.config.precision import FP8
from weft.config.recompute import Recompute
from weft.models.shape import Shape
from weft.plan.machine import Cluster
from weft.plan.work import Cut, Num, Sizes, Software, Work


def flying(schedule: str, pp: Num, vp: Num) -> Num:
    """Micro-batches that the first stage's process keeps at a time: Narayanan et al. 2021; Qi et al. 2024, table 1; the
    README of DualPipe. gpipe and bfs keep all."""
    if schedule in ("gpipe", "bfs"):
        return np.inf + 0 * pp
    more = {"interleaved": (pp - 1) / vp, "dualpipev": 0.5}.get(schedule, 0)
    return pp + more


def put_off(schedule: str, pp: Num) -> Num:
    """Micro-batches whose gradients of weights wait at a time, on a process late in the pipeline: schedules/orders.py."""
    return {"zbh1": pp, "zbv": pp - 0.5, "dualpipev": pp / 2}.get(schedule, 0 * pp)


class Job(BaseModel):
    """What is to be trained: tokens in a sequence, sequences in a step, tokens in all.

    Attributes:
        busiest_expert: what the busiest expert of any block is given, in even shares, as a run's log says it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    tokens: float = Field(1e12, gt=0)
    busiest_expert: float = Field(1, ge=1)
    matmul: Literal["16 bit", "fp8"] = "16 bit"


WEFT = Software(
    stops=1,
    overlap_dp=1,
    balanced=2,
    flash=2,
    fused=0,
    fused_norm=2,
    logits=2,
    lean_loss=1,
    keeps_gathered=1,
    results=1,
    adds=1,
    freed=1,
    weighs=2,
    masks=1,
    own_head=1,
    weights=4,
    gradients=4,
    master=0,
    moments=8,
    reduced=4,
)
"""weft itself: weights, gradients and moments in fp32 and what is computed with beside them (config/layout.py)."""
MEGATRON = Software()
"""Megatron-LM with its distributed optimizer: bf16 weights, fp32 gradients, fp32 master weights and moments."""


def numbers(shape: Shape, layout: Layout, job: Job, cluster: Cluster, software: Software = WEFT) -> Work:
    """One layout as a Work. What is compiled has norms and activations as one kernel each; experts never are."""
    if layout.compile and shape.experts is None:
        software = replace(software, fused=1)
    return Work(sizes(shape, job), cut(shape, layout, job), cluster.machine(), software)


def sizes(shape: Shape, job: Job) -> Sizes:
    """
    Raises:
        ValueError: the sequences are longer than the model's learned positions; or no expert can be so busy.
    """
    if shape.positions == "learned" and job.seq > shape.max_seq:
        raise ValueError(
            f"sequences of {job.seq:,} tokens are longer than the {shape.max_seq:,} learned positions of the model: take "
            "shorter ones, or a model with rotary positions"
        )
    experts, latent = shape.experts, shape.latent
    most = experts.num_experts / experts.per_token if experts else 1.0  # then every token goes to it
    if job.busiest_expert > most:
        raise ValueError(
            f"a busiest expert of {job.busiest_expert:g} even shares: "
            + (
                f"with {experts.per_token} of {experts.num_experts} for each token it is given {most:g} at most"
                if experts
                else "this model has no experts"
            )
        )
    return Sizes(
        layers=shape.num_layers,
        hidden=shape.hidden,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        matrices=shape.mlp_matrices,
        vocab=shape.vocab,
        tied=float(shape.tied),
        positions=shape.max_seq if shape.positions == "learned" else 0,
        window=shape.sliding_window or job.seq,
        experts=experts.num_experts if experts else 0,
        per_token=experts.per_token if experts else 0,
        expert_ffn=experts.ffn if experts else 0,
        dense_layers=experts.dense_layers if experts else shape.num_layers,
        seq=job.seq,
        batch=job.global_batch,
        shared_ffn=shape.shared_ffn,
        q_rank=(latent.q_rank or 0) if latent else 0,
        kv_rank=latent.kv_rank if latent else 0,
        rope_dim=latent.rope_dim if latent else 0,
        value_dim=latent.value_dim if latent else 0,
        qk_norm=float(shape.qk_norm),
        busiest=job.busiest_expert,
    )


def in_8_bits(layout: Layout, job: Job) -> bool:
    """Whether matrices are multiplied so."""
    return job.matmul == "fp8" or layout.precision in FP8


def cut(shape: Shape, layout: Layout, job: Job) -> Cut:
    recompute = Recompute.parse(layout.recompute)
    stage = -(-shape.num_layers // layout.num_stages)  # blocks of the largest
    again = len(recompute.blocks(stage)) / stage
    products = "matmul" in recompute.keeps  # else all but a little is made again, as of a whole block
    return Cut(
        dp=layout.dp,
        fsdp=layout.fsdp,
        zero=layout.zero if layout.fsdp > 1 else 0,
        tp=layout.tp,
        sp=float(layout.sp),
        cp=layout.cp,
        gathers=float(layout.cp_kind == "allgather"),
        pp=layout.pp,
        vp=layout.num_chunks,
        ep=layout.ep,
        etp=layout.expert_tp,
        micro_batch=layout.micro_batch_size(job.global_batch),
        full=0.0 if products or recompute.redone else again,
        every=recompute.every,
        first=np.inf if recompute.first is None else recompute.first,
        selective=again if products else 0.0,
        redo_attention=again if "attention" in recompute.redone else 0.0,
        redo_mlp=again if "mlp" in recompute.redone else 0.0,
        redo_experts=again if "experts" in recompute.redone else 0.0,
        chunked=float(layout.loss == "chunked"),
        item=4 if layout.precision == "fp32" else 2,
        fp8=float(in_8_bits(layout, job)),
        flying=float(flying(layout.schedule, layout.pp, layout.num_chunks)),
        put_off=float(put_off(layout.schedule, layout.pp)),
        dual=float(layout.schedule == "dualpipev"),
        ulysses=float(layout.cp_kind == "ulysses"),
        offload=float(layout.offload),
        away=float(layout.offload_weights),
        moments_away=float(layout.offload_optimizer),
    )
