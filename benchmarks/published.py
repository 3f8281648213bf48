"""Published runs, one JSON object a line, as weft's nouns: Shape, Layout, Cluster, Job, and what the software did.

A row says `model` {layers, hidden, heads, kv_heads, head_dim, ffn, ffn_gated, vocab, seq, experts, topk, moe_ffn, …},
`gpu`, `gpus`, `nvlink_domain`, `interconnect`, the cut (`tp`, `pp`, `vpp`, `cp`, `dp`, `ep`, `etp`, `zero_stage`,
`fsdp`), `micro_batch` or `grad_accum`, `global_batch_sequences`, `recompute`, `precision`, and under `measured` a step
time, a throughput or FLOP/s, with memory in GiB. What a row leaves out is filled with what its software does.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nanotron
from machines import cluster_of
from systems import REMAKES, is_titan, modules, policy, redone, since_hopper, software_of, zero_of
from weft.config.layout import Layout
from weft.models.shape import Experts, Latent, Shape
from weft.plan.machine import Cluster
from weft.plan.memory.footprint import footprint
from weft.plan.numbers import Job, numbers
from weft.plan.time.imbalance import fullest_share
from weft.plan.work import Software, Work

GIB = 2**30

KNOWN: dict[str, dict[str, Any]] = {
    "126m": {"layers": 12, "hidden": 768, "heads": 12},
    "5b": {"layers": 24, "hidden": 4096, "heads": 32},
    "20b": {"layers": 44, "hidden": 6144, "heads": 48},
    "40b": {"layers": 48, "hidden": 8192, "heads": 64},
    "175b": {"layers": 96, "hidden": 12288, "heads": 96},
    "gpt3-5b": {"layers": 24, "hidden": 4096, "heads": 32},
    "gpt3-20b": {"layers": 44, "hidden": 6144, "heads": 48},
    "nemotron-8b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 16384, "ffn_gated": False, "vocab": 256000},
    "nemotron-22b": {"layers": 40, "hidden": 6144, "heads": 48, "ffn": 24576, "ffn_gated": False, "vocab": 256000},
    "llama-2-34b": {"layers": 48, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 22016, "vocab": 32000},
    "llama-2-70b": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 32000},
}  # fmt: skip
"""Published sizes of models that a row may only name."""


@dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
        seconds: of a step; None where it failed or nothing follows.
        memory: bytes at the peak, of rank 0 if not told otherwise; None where it is not told.
        status: why it gave no number, else "".
        duplicate: another row tells the same run.
        zero: of what is sharded over cp alone.
        fullest: the memory is that of the GPU that has most.
        reserved: it is what the allocator took, holes and all.
        all: it is what the driver sees: what CUDA and NCCL took too.
        away: the share of blocks whose activations go to the CPU, where any do.
    """

    name: str
    set: str
    gpu: str
    model: str
    shape: Shape
    layout: Layout
    job: Job
    cluster: Cluster
    software: Software
    seconds: float | None
    memory: float | None
    status: str
    duplicate: bool
    zero: int = 0
    fullest: bool = False
    reserved: bool = False
    all: bool = False
    away: float = 0.5

    @property
    def work(self) -> Work:
        work = numbers(self.shape, self.layout, self.job, self.cluster, self.software)
        if self.layout.offload:
            work = replace(work, cut=replace(work.cut, offload=self.away))
        if self.zero and self.layout.fsdp == 1 and self.layout.cp > 1:  # Megatron shards over cp where there is no dp
            work = replace(work, cut=replace(work.cut, zero=self.zero))
        return work


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def read_run(row: dict[str, Any]) -> Run:
    """Raises: ValueError, KeyError: why this row is beyond what weft's nouns say, or does not say enough."""
    row = {"measured": {}} | {key: value for key, value in row.items() if value is not None}
    if str(row.get("task", "")).startswith("lora"):
        raise ValueError("lora: frozen weights are not modelled")
    measured = row.get("measured", {})
    shape, job = _shape(row), _job(row)
    layout = _layout(row, job)
    if "routing as it comes" in row.get("extras", []) and layout.ep > 1:
        job = job.model_copy(update={"busiest_expert": _busiest(shape, layout)})
    software, cluster = software_of(row), cluster_of(row)
    if nanotron.is_sweep(row):
        software = nanotron.that_fits(software, numbers(shape, layout, job, cluster, software))
    if not row.get("recompute") and _counts_recompute(row, shape, job):
        layout = layout.model_copy(update={"recompute": "full"})
    mixture = row["model"].get("experts") and row.get("framework", "").startswith("Megatron-Core")
    if not row.get("micro_batch") and not row.get("grad_accum") and layout.pp == 1 and not mixture:
        layout = _largest(shape, layout, job, cluster, software)
    if not row.get("recompute") and layout.recompute == "none" and not measured.get("status"):
        layout, software = _that_fits(shape, layout, job, cluster, software)
    seconds = None if measured.get("status") else _seconds(row, shape, job)
    memory = measured.get("peak_mem_gib")
    return Run(
        name=str(row["id"]), set=str(row.get("set", "?")), gpu=row["gpu"], model=str(row["model"].get("name")),
        shape=shape, layout=layout, job=job, cluster=cluster, software=software, seconds=seconds,
        memory=float(memory) * GIB if memory else None, status=str(measured.get("status") or ""),
        duplicate="duplicate_of" in row, zero=zero_of(row), fullest=measured.get("peak_mem_gpu") == "fullest",
        reserved=measured.get("peak_mem_kind") in ("reserved", "nvidia-smi"),
        all=measured.get("peak_mem_kind") == "nvidia-smi", away=_away(row, shape),
    )  # fmt: skip


UNEVEN = 1.55
"""Tokens of the process that all wait for, in even shares, where nothing has made routing even yet. Runs that differ in
nothing else show it: Qwen3-235B with ep 8 takes 24, 21, 15 and 9 % longer than with balance forced on it, with 16,384 to
131,072 tokens, always 0.17 ms a token, which is what 1.6 comes to (Megatron-MoE-ModelZoo, best_practice/Qwen3); with its
trained router, on other data, 39 %, of parts that are told, which makes 1.5 (PrimeIntellect's prime-rl,
docs/performance.md)."""


def _busiest(shape: Shape, layout: Layout) -> float:
    """What the busiest expert has then, as plans are told it."""
    experts = shape.experts
    assert experts is not None
    twice = fullest_share(2, experts.num_experts, shape.num_layers - experts.dense_layers, layout.ep)
    return min(1 + (UNEVEN - 1) / (float(twice) - 1), experts.num_experts / experts.per_token)


def _away(row: dict[str, Any], shape: Shape) -> float:
    """As its recipe says; else half, as those recipes mostly have it: of 20 to 40 blocks of 80."""
    blocks = row.get("recipe", {}).get("cpu_offloading_num_layers")
    return blocks / shape.num_layers if blocks else 0.5


def _counts_recompute(row: dict[str, Any], shape: Shape, job: Job) -> bool:
    """Whether more FLOP/s are told than the step's time and the model's own FLOPs come to, by a third."""
    measured = row.get("measured", {})
    if not (measured.get("step_s") and measured.get("tflops_per_gpu")):
        return False
    told = measured["tflops_per_gpu"] * 1e12 * row["gpus"] * measured["step_s"]
    return 1.25 < told / (shape.flops_per_token(job.seq, causal=False) * job.seq * job.global_batch) < 1.45


def _largest(shape: Shape, layout: Layout, job: Job, cluster: Cluster, software: Software) -> Layout:
    """With the largest micro-batch up to 4 that fits well: whoever did not tell it had no reason to take less."""
    for size in (4, 2):
        larger = layout.model_copy(update={"micro_batch": size})
        if job.global_batch // layout.replicas % size == 0:
            held = footprint(numbers(shape, larger, job, cluster, software))
            if held.total < 0.85 * cluster.memory:
                return larger
    return layout


def _that_fits(shape: Shape, layout: Layout, job: Job, cluster: Cluster, software: Software) -> tuple[Layout, Software]:
    """What a run that did not tell must have saved memory with, since it ran."""
    held = footprint(numbers(shape, layout, job, cluster, software))
    if held.fits(cluster.machine()):
        return layout, software
    if software.keeps_gathered == 1:
        return layout, replace(software, keeps_gathered=0)
    if held.total > 1.4 * cluster.memory:
        # where a Grace is beside it, Megatron-Bridge's recipes have what blocks keep go there
        grace = cluster.host_gb_per_s > 150
        return layout.model_copy(update={"offload": True} if grace else {"recompute": "full"}), software
    if software.flash >= 2:
        return layout.model_copy(update={"recompute": "selective"}), software
    return layout, software


def _shape(row: dict[str, Any]) -> Shape:
    told = {key: value for key, value in row["model"].items() if value is not None}
    model = {**KNOWN.get(str(told.get("name", "")).lower(), {}), **told}
    if "ssm" in model or "Nemotron-3" in str(model.get("name")) or "Nemotron-H" in str(model.get("name")):
        raise ValueError("state-space blocks are not modelled")
    if not {"layers", "hidden", "heads"} <= model.keys():
        raise ValueError("layers, hidden or heads are not told")
    gated, hidden = bool(model.get("ffn_gated")), model["hidden"]
    ffn = model.get("ffn") or (-(-hidden * 8 // 3 // 256) * 256 if gated else 4 * hidden)
    experts = None
    if model.get("experts"):
        experts = Experts(
            num_experts=model["experts"], per_token=model["topk"], ffn=model.get("moe_ffn") or ffn,
            dense_layers=model.get("dense_layers", 0), shared=model.get("shared_experts", 0),
        )  # fmt: skip
    latent = None
    if model.get("attention") == "MLA":
        latent = Latent(
            q_rank=model.get("q_lora"), kv_rank=model["kv_lora"], nope_dim=model["qk_nope"], rope_dim=model["qk_rope"],
            value_dim=model["v_head"],
        )  # fmt: skip
    return Shape(
        num_layers=model["layers"], hidden=hidden, num_heads=model["heads"],
        num_kv_heads=model.get("kv_heads") or model["heads"], latent=latent,
        head_dim=latent.nope_dim + latent.rope_dim if latent else model.get("head_dim") or hidden // model["heads"],
        ffn=ffn, vocab=model.get("vocab") or 51200,
        max_seq=model.get("seq") or 2048, positions="learned" if model.get("learned_pos_emb") else "rotary",
        activation="swiglu" if gated or experts else "gelu",
        tied=bool(model.get("tied_embeddings", not gated and not experts)),
        experts=experts, sliding_window=_window(model),
    )  # fmt: skip


def _window(model: dict[str, Any]) -> int | None:
    """None for GPT-OSS, whose every other block has one: its runs take as long as if all of them saw all."""
    return None if "GPT-OSS" in str(model.get("name")) else model.get("sliding_window")


def _job(row: dict[str, Any]) -> Job:
    batch = row.get("global_batch_sequences")
    if not batch and row.get("micro_batch") and row.get("dp"):
        batch = row["micro_batch"] * row.get("grad_accum", 1) * row["dp"]
    if not batch:
        raise ValueError("global_batch_sequences is not told")
    seq = row["model"].get("seq") or (1024 if "2020" in row.get("set", "") else 2048)
    fp8 = any(word in str(row.get("precision", "")).lower() for word in ("fp8", "float8", "fp4"))
    return Job(seq=seq, global_batch=int(batch), matmul="fp8" if fp8 else "16 bit")


def _layout(row: dict[str, Any], job: Job) -> Layout:
    if row.get("tp") is None and row.get("model_parallel_size", 1) != 1:
        size = row["model_parallel_size"]
        row = {**row, "tp": min(8, size), "pp": max(1, size // 8)}  # tensors in the node, then stages
    if row.get("tp") is None and row.get("pp") is None and row.get("dp") is None:
        raise ValueError("the layout is not told")
    tp, pp, cp, gpus = row.get("tp") or 1, row.get("pp") or 1, row.get("cp") or 1, row["gpus"]
    if gpus % (tp * pp * cp):
        raise ValueError("tp·pp·cp does not divide the GPUs")
    replicas = gpus // (tp * pp * cp)
    hopper, zero = since_hopper(row), zero_of(row)
    titan = is_titan(row)
    groups = re.findall(r"\d+", f"{row.get('fsdp') or ''}")
    group = row.get("zero1_group")
    shards = int(groups[0]) if groups else group if isinstance(group, int) and group > 0 else replicas
    if row.get("fsdp") == "HSDP":
        shards = row.get("gpus_per_node", 8)
    if not zero or replicas % shards:
        shards = replicas if zero else 1
    if job.global_batch % replicas:
        raise ValueError("the batch is not a multiple of the replicas")
    local = job.global_batch // replicas
    micro_batch = row.get("micro_batch") or (local // row["grad_accum"] if row.get("grad_accum") else 1)
    counted = "recompute" in str(row.get("flops_convention", ""))
    # paxml's own GPT experiments save nothing
    recompute = str(row.get("recompute") or ("full" if counted or "pax" in row.get("set", "") else "none"))
    if policy(row) in REMAKES:
        recompute = "selective"
    if set(modules(row)) <= {"mla_up_proj", "mlp"} and modules(row):  # no more than latent attention, and few blocks
        recompute = "none"
    if parts := redone(row):
        recompute = f"redo-{'+'.join(parts)}"
    recompute = re.split("[ :]", recompute)[0]
    told = row.get("measured", {})
    if recompute.startswith("selective") and told.get("hfu") and told.get("mfu") and row.get("fsdp"):
        share = 3 * (told["hfu"] / told["mfu"] - 1)  # of the blocks: torch's "selective" is some of them, whole
        layers = row["model"].get("layers") or KNOWN[row["model"]["name"].lower()]["layers"]
        again = round(share * layers)
        recompute = "full" if again >= layers else f"full:{again}" if again > 0 else "none"
    if titan and pp > 1 and not row.get("grad_accum") and local // micro_batch < pp:
        micro_batch = max(1, local // pp)  # its local batch is cut into as many as there are stages
    sp = row.get("sp")
    if sp is None:
        sp = bool(row.get("recipe", {}).get("sequence_parallel", hopper)) or "selective" in recompute
    vp = row.get("vpp") or 1
    if (
        row.get("vpp") is None
        and not row.get("schedule")
        and pp > 1
        and hopper
        and software_of(row).overlap_pp
        and not (row["model"].get("experts") and row.get("framework", "").split()[:1] != ["Megatron-Core"])
    ):
        layers = row["model"]["layers"]
        layers += 2 * (layers % pp > 0)  # else the embedding and the head count as a block each
        blocks = layers / pp  # its recipes interleave where they can, mostly by two blocks
        vp = int(blocks / 2 if blocks % 2 == 0 else blocks if blocks % 1 == 0 else 1)
    ep = row.get("ep") or 1
    told_etp = row.get("etp") or row.get("recipe", {}).get("expert_tensor_parallel_size")
    etp = told_etp or (None if replicas * cp % ep == 0 else 1)
    offloaded = row.get("recipe", {}).get("cpu_offloading_num_layers")
    return Layout(
        dp=replicas // shards, fsdp=shards, zero=zero if shards > 1 else 3, tp=tp, sp=bool(sp) and tp > 1, cp=cp,
        cp_kind="ring" if cp > 1 else "allgather", pp=pp, vp=vp if pp > 1 else 1,
        schedule=_schedule(row, vp) if pp > 1 else "1f1b", ep=ep, etp=etp if row["model"].get("experts") else None,
        micro_batch=max(1, int(micro_batch)), precision="bf16",
        loss="chunked" if "loss in chunks" in row.get("extras", []) else "whole",
        recompute=recompute if recompute.startswith(("full", "selective", "redo")) else "none",
        offload="activation offloading" in str(row.get("extras")) or bool(offloaded),
        offload_optimizer="optimizer offloaded to the CPU" in row.get("extras", []),
    )  # fmt: skip


SCHEDULES = (
    ("1f1b", "1f1b"), ("interleav", "1f1b"), ("dualpipev", "dualpipev"), ("dualpipe", "1f1b"), ("gpipe", "gpipe"),
    ("zbh1", "zbh1"), ("zb1p", "zbh1"), ("zbv", "zbv"), ("vzb", "zbv"),
)  # fmt: skip
"""A schedule's name, without dashes → the order that it is read as. ZB-1p, which is searched for under 1f1b's memory, waits
as long as ZB-H1 does (Qi et al. 2023, table 5). What lets more or fewer micro-batches in (ZB-2p, V-Half) is not there."""


def _schedule(row: dict[str, Any], vp: int) -> str:
    told = str(row.get("schedule") or "1f1b").lower().replace("-", "").replace(" ", "")
    name = next((name for word, name in SCHEDULES if told.startswith(word)), None)
    if name is None:
        raise ValueError(f"no order of a pipeline here is {row['schedule']}")
    return "interleaved" if name == "1f1b" and vp > 1 else name


def _seconds(row: dict[str, Any], shape: Shape, job: Job) -> float | None:
    """Of a step. FLOP/s are turned back by the convention that they were counted in."""
    measured, tokens = row["measured"], job.seq * job.global_batch
    if measured.get("step_s"):
        return float(measured["step_s"])
    if measured.get("tokens_per_s"):
        return tokens / measured["tokens_per_s"]
    if measured.get("tokens_per_s_per_gpu"):
        return tokens / measured["tokens_per_s_per_gpu"] / row["gpus"]
    if measured.get("sequences_per_s"):
        return job.global_batch / measured["sequences_per_s"]
    told = str(row.get("flops_convention", "")).lower()
    rate = measured.get("hw_tflops_per_gpu")
    flops = tokens * shape.flops_per_token(job.seq, causal="causal" in told and "non-causal" not in told)
    if rate or "recompute" in told:
        rate = rate or measured.get("tflops_per_gpu")
        flops *= 4 / 3
    rate = rate or measured.get("tflops_per_gpu")
    if rate:
        return flops / rate / 1e12 / row["gpus"]
    if measured.get("mfu"):
        return flops / measured["mfu"] / (cluster_of(row).peak_tflops * 1e12) / row["gpus"]
    return None
