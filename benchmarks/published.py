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
from weft.config.layout import Layout
from weft.models.shape import Experts, Latent, Shape
from weft.plan.machine import Cluster, read_cluster
from weft.plan.memory.footprint import footprint
from weft.plan.numbers import Job, numbers
from weft.plan.time.constants import CONSTANTS
from weft.plan.work import Software, Work

GIB = 2**30

MEGATRON_21 = Software(flash=0, overlap_dp=0, blocking=1, dropout=1, gradients=4, reduced=2)
NEMO_22 = replace(MEGATRON_21, overlap_dp=1, gradients=2)
MEGATRON_CORE = Software(flash=2, overlap_tp=1, overlap_pp=1, gradients=2, reduced=2)
MEGATRON_24 = replace(MEGATRON_CORE, flash=1)  # before Transformer Engine preferred cuDNN's attention, mid-2024
MEGATRON_25 = replace(MEGATRON_CORE, flash=3, keeps8=1, weighs=1)  # with the cuDNN of December 2024 and later
# all get all gradients: its ZeRO 1 and 2 reduce them whole, and so does its optimizer for bf16 (stage_1_and_2.py,
# bf16_optimizer.py)
MEGATRON_DS = replace(MEGATRON_21, reduced=2, adds=1, whole_dp=1)
NEMO_24 = replace(MEGATRON_CORE, master=2)  # Apex keeps the 16 bits that bf16 weights lack
TORCH = Software(fused=0, weights=4, gradients=4, master=0, reduced=4, stops=1)
TORCH_LOSS = replace(TORCH, logits=12)
# exponents in fp32, gradients in 16 bits (MaxText, max_utils.py)
XLA = replace(MEGATRON_CORE, overlap_tp=0, logits=6, stops=1)
COMPILED = replace(TORCH, fused=1)
# gradients in 16 bits, reduced whole in fp32 when all is done; send and recv; uniform stages; beside torch's loss this
# micro-batch's logits and those before stay in buffers (its core/optimizer, core/nn/parallel_module); under sp norms gather
# what they give, and it is kept whole (core/nn/norm/rms_norm.py)
SCALING = Software(
    fused=0, flash=0, logits=16, overlap_dp=0, blocking=1, balanced=2, adds=1, whole_head=1, whole_dp=1, gradients=2,
    keeps_gathered=1,
)  # fmt: skip
INTERN_EVO = Software(  # Apex's RMSNorm
    blocking=1, fused=0, fused_norm=1, overlap_dp=0.5, reduced=2, gradients=2, adds=1, turns=2.5e-3,
)  # fmt: skip
DEEPSPEED = replace(MEGATRON_21, reduced=2, overlap_dp=0.5)
DEEPSPEED_HF = replace(DEEPSPEED, fused=0, dropout=0)  # norms and activations of transformers' LLaMA are eager
FUSED = 0.49  # of the traffic of dealing tokens out, where permutations are fused (--moe-permute-fusion): fitted
SOFTWARE: tuple[tuple[str, Software], ...] = (
    ("nanotron", nanotron.NANOTRON), ("MaxText", XLA), ("AA-Scaling", SCALING),
    ("llm-foundry", replace(TORCH, logits=4, stops=0)),  # PyTorch before 2.1
    ("fms-fsdp", replace(TORCH, fused=1, reduced=2)),
    ("torchtitan", replace(TORCH_LOSS, alternate=1, gathers8=1)),
    ("InternEvo", INTERN_EVO),
    ("vTrain", replace(MEGATRON_21, fused=0, adds=1, gradients=2)),
    ("Megatron-DeepSpeed", MEGATRON_DS),
    ("ATorch, DeepSpeed", DEEPSPEED_HF), ("Hugging Face's LLaMA", DEEPSPEED_HF),  # the former: its ds_3d_llama2.py
    ("DeepSpeed", DEEPSPEED),
    ("PaddleNLP", replace(MEGATRON_21, fused=0, fused_norm=2, dropout=0)),  # as the configs that its page names
    ("2021-01", replace(MEGATRON_21, whole_pp=1)), ("Smith et al. 2022", replace(MEGATRON_21, whole_pp=1, adds=1)),
    ("AutoModel", replace(TORCH, fused=1, flash=3, weights=2, gradients=2, master=0, moments=4, reduced=2)),
    ("SimuMax", Software(flash=2, overlap_dp=0)),
    ("NeMo Megatron 22", NEMO_22), ("NeMo 24.12", replace(NEMO_24, flash=3)), ("NeMo 25", MEGATRON_25),
    ("NeMo 24.", NEMO_24), ("nemo-24", NEMO_24),
    ("DeepSeek-V3 README", replace(MEGATRON_CORE, overlap_ep=1, dedup=1)),
    ("Bridge", replace(MEGATRON_25, overlap_ep=1, dedup=1, routing=FUSED)),
    ("dgxc", MEGATRON_CORE), ("NeMo", MEGATRON_CORE),
    ("ModelZoo", MEGATRON_25), ("mcore", MEGATRON_24),
    ("Primus", replace(MEGATRON_25, gradients=4, reduced=4, overlap_tp=0, adds=1)),  # its configurations for MI300X
    ("Megatron-Core 2025", replace(MEGATRON_25, gradients=4, reduced=4)),
    ("Megatron-Core", replace(MEGATRON_24, gradients=4, reduced=4)),
    ("JAX", XLA), ("pax", XLA), ("Levanter", XLA), ("EasyLM", XLA),
    ("TinyLlama", COMPILED), ("litgpt", COMPILED), ("lit-gpt", COMPILED), ("OLMo", COMPILED), ("torchtune", COMPILED),
    ("Kempner", replace(TORCH_LOSS, flash=2, weights=2, gradients=2, moments=4, reduced=2, whole_head=1)),
    ("Transformer Engine", replace(COMPILED, flash=2, keeps8=1, reduced=2)),
    ("PyTorch", TORCH_LOSS), ("FSDP", TORCH_LOSS), ("accelerate", TORCH_LOSS), ("transformers", TORCH_LOSS),
    ("Megatron-LM", MEGATRON_21), ("Narayanan", MEGATRON_21), ("Korthikanti", MEGATRON_21),
)  # fmt: skip
"""A word of the row's set, framework or source → what that software does. The first that is found counts."""

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
    software, cluster = _software(row), _cluster(row)
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
        name=row["id"], set=row.get("set", "?"), gpu=row["gpu"], model=str(row["model"].get("name")),
        shape=shape, layout=layout, job=job, cluster=cluster, software=software, seconds=seconds,
        memory=memory * GIB if memory else None, status=str(measured.get("status") or ""),
        duplicate="duplicate_of" in row, zero=_zero(row), fullest=measured.get("peak_mem_gpu") == "fullest",
        reserved=measured.get("peak_mem_kind") in ("reserved", "nvidia-smi"),
        all=measured.get("peak_mem_kind") == "nvidia-smi", away=_away(row, shape),
    )  # fmt: skip


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
    if not row.get("global_batch_sequences"):
        raise ValueError("global_batch_sequences is not told")
    seq = row["model"].get("seq") or (1024 if "2020" in row.get("set", "") else 2048)
    fp8 = any(word in str(row.get("precision", "")).lower() for word in ("fp8", "float8", "fp4"))
    return Job(seq=seq, global_batch=int(row["global_batch_sequences"]), matmul="fp8" if fp8 else "16 bit")


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
    hopper, zero = _since_hopper(row), _zero(row)
    titan = _is_titan(row)
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
    if _policy(row) in REMAKES:
        recompute = "selective"
    if set(_modules(row)) <= {"mla_up_proj", "mlp"} and _modules(row):  # no more than latent attention, and few blocks
        recompute = "none"
    if parts := _redone(row):
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
        and _software(row).overlap_pp
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


REMAKES = {
    "save_dot_with_context_except_mlp": 1,
    "save_dot_except_mlp": 2,
    "save_dot_except_mlpwi": 2,
    "save_qkv_proj": 3,
}
"""MaxText's policies of remat: what of a block they make again."""


def _policy(row: dict[str, Any]) -> str:
    """As the row says; else as NVIDIA's recipes for MaxText had it (dgxc-benchmarking, maxtext/configure.sh)."""
    source = row.get("source", "")
    told = row.get("remat_policy") or ("maxtext/" in source and "dgxc" in source and "save_qkv_proj")
    return "save_dot_except_mlp" if told and "v24.11" in source else str(told or "")


def _modules(row: dict[str, Any]) -> list[str]:
    """What Megatron-Core's selective recomputation is told to compute again."""
    return [str(name) for name in row.get("recipe", {}).get("recompute_modules", [])]


def _redone(row: dict[str, Any]) -> list[str]:
    """The parts of a block that are computed again as a whole. Norms and activations, which may be named beside them, are
    parts of these."""
    told = str(row.get("recompute") or "")
    named = {*_modules(row), *(re.split("[, ]+", told.partition(":")[2]) if told.startswith("selective:") else ())}
    mlp = {"moe"} if row["model"].get("experts") else {"mlp"}  # a mixture's "mlp" is that of its few dense blocks
    parts = {"attention": {"attn"}, "mlp": mlp, "experts": {"moe_expert"}}
    return [part for part, names in parts.items() if named & names]


def _is_titan(row: dict[str, Any]) -> bool:
    return "torchtitan" in f"{row.get('framework')} {row.get('set')} {row.get('source')}".lower()


def _has_bf16_optimizer(row: dict[str, Any]) -> bool:
    """DeepSpeed's for bf16 without ZeRO, and of pipelines in it: states are shared among replicas (bf16_optimizer.py)."""
    named = row.get("framework") == "Megatron-DeepSpeed" and row.get("precision") == "bf16"
    return named and (not row.get("zero_stage") or (row.get("pp") or 1) > 1)


def _is_bloom(row: dict[str, Any]) -> bool:
    return any(word in f"{row.get('set')} {row.get('source')}".lower() for word in ("bloom", "tr11"))


def _since_hopper(row: dict[str, Any]) -> bool:
    return not any(word in row["gpu"] for word in ("A100", "V100"))


def _zero(row: dict[str, Any]) -> int:
    """As the row says; but torchtitan's pipelines keep gathered weights, and add up whole gradients, to the step's end."""
    zero = row.get("zero_stage")
    if zero is None:
        return 3 if row.get("fsdp") else int(_since_hopper(row))
    if zero == 0 and _has_bf16_optimizer(row):
        return 1
    return 1 if zero == 3 and _is_titan(row) and (row.get("pp") or 1) > 1 else zero


PRESETS = (
    ("GB300", "gb300"), ("GB200", "gb200"), ("GH200", "gh200"), ("B300", "b300"),
    ("B200", "b200"), ("H200", "h200"),
    ("H100-96", "h100-96gb"), ("H100", "h100"), ("H800", "h100"),
    ("A800", "a100-80gb"), ("A100-40", "a100-40gb"), ("A100", "a100-80gb"), ("V100", "v100-32gb"), ("MI300X", "mi300x"),
)  # fmt: skip


FP4 = 1.88
"""Times as fast as in 8 bits products are in NVFP4, whose peak is 2 (GB200) and 3 (GB300) times as high."""


def _cluster(row: dict[str, Any]) -> Cluster:
    preset = next((preset for word, preset in PRESETS if word in row["gpu"].upper()), None)
    if preset is None:
        raise ValueError(f"no cluster file for {row['gpu']}")
    cluster = read_cluster(preset, row["gpus"])
    change: dict[str, Any] = {}
    if nanotron.is_sweep(row):
        # EFA: of 3,200 Gb/s a node two thirds (Ultrascale Playbook, all-reduce over nodes); the wait was fitted
        change |= {"network_gb_per_s": 35, "network_wait_us": 353}
    if "fp4" in str(row.get("precision", "")).lower():
        change["peak_8bit_tflops"] = FP4 * cluster.peak_8bit_tflops
    if "16GB" in row["gpu"]:
        change["memory_gib"] = 16
    if "DGX2" in row["gpu"]:  # DGX-2H: 450 W; 130 TFLOP/s (Megatron-LM 1.0's page), of which it keeps what A100 does
        change |= {"mesh": False, "peak_tflops": 130, "gemm_efficiency": 0.83}
    if domain := row.get("nvlink_domain"):
        change["nvlink_domain"] = domain
    per_node = row.get("gpus_per_node") or cluster.per_node
    if "EFA" in str(row.get("interconnect")):
        change["network_wait_us"] = 350  # of docs/accuracy.md: what vTrain's machine has not, and AWS's has
    if network := _network(str(row.get("interconnect") or "")):
        change["network_gb_per_s"] = network / 8 / per_node
    if "PCI" in row["gpu"].upper():
        # messages take the way to the CPU, and to the other; 16 GB/s (SimuMax, configs/system/a100_pcie.json)
        change |= {"nvlink_gb_per_s": cluster.host_gb_per_s, "halves_gb_per_s": 16}
    if "H800" in row["gpu"] or "A800" in row["gpu"]:
        change["nvlink_gb_per_s"] = 200
    if row["gpu"] == "B200" and "SimuMax" in row.get("source", ""):
        # that machine's products, large ones, have 0.45 to 0.51 of the peak (SimuMax, configs/system/b200_bf16_ceperm.json)
        change["gemm_efficiency"] = 0.496
    if "Omni-Path" in str(row.get("interconnect")):
        # PSM2 opens one adapter for a process, and NCCL sees one: a group leaves a node by one process
        change["adapter_gb_per_s"] = 12.5
        if "A100" in row["gpu"]:  # Jean Zay's: "NVLink 4 inter-gpu connects" (BLOOM's model card), where a DGX has 12
            change["nvlink_gb_per_s"] = 100
    return cluster.model_copy(update=change)


def _network(text: str) -> float | None:
    """Gb/s of a node."""
    if match := re.search(r"(\d+)\s*x\s*(?:\w+ )*?(\d+)\s*Gb", text):
        return float(match[1]) * float(match[2])
    if match := re.search(r"inter_node_bandwidth (\d+)", text):
        return float(match[1])
    match = re.search(r"(\d+)\s*Gb(?:ps|/s)?(?: node-node| per node)", text)
    return float(match[1]) if match else None


def _software(row: dict[str, Any]) -> Software:
    told = f"{row.get('framework') or ''} {row.get('set', '')} {row.get('framework_version') or ''} {row.get('source', '')}"
    ampere = any(word in row["gpu"] for word in ("A100", "V100"))
    default = MEGATRON_21 if ampere else MEGATRON_CORE
    told = told.lower().replace("nemotron", "")  # a model, not NeMo
    found = next((software for word, software in SOFTWARE if word.lower() in told), default)
    if found is MEGATRON_21 and not ampere:
        found = replace(MEGATRON_CORE, gradients=4, reduced=4) if "megatron-lm" in told else MEGATRON_CORE
    if found is nanotron.NANOTRON:
        found = nanotron.software(row)
    if found.flash == 1 and any(word in row["gpu"] for word in ("B200", "B300")):
        found = replace(found, flash=2)  # FlashAttention-2 is none of Blackwell's
    if found is MEGATRON_DS and row.get("precision") == "fp16":  # added up as they are; its own share of them in fp32
        found = replace(found, gradients=2, master=8)
    elif found is DEEPSPEED and _zero(row) == 3:
        # nothing hides its messages: Azure's runs with micro-batches of 1 to 32
        found = replace(found, overlap_dp=0, sharded=ZERO_3_2021 if "2021" in told else 1)
    elif found is MEGATRON_DS and row.get("precision") == "bf16":  # and, by its own optimizer, beside them in fp32
        found = replace(found, gradients=6 if _has_bf16_optimizer(row) else 2)
    elif found.master == 4 and row.get("precision") == "fp16":  # Megatron adds up in fp32 for bf16 alone (arguments.py)
        found = replace(found, gradients=2, reduced=2)
    if _is_bloom(row) or "CUDA_LAUNCH_BLOCKING" in row.get("extras", []):  # it stands in BLOOM's scripts, against hangs
        found = replace(found, waits=1)
    if "llama" in str(row["model"].get("family")) and found.dropout:  # LLaMA has none
        found = replace(found, dropout=0)
        if "Megatron-DeepSpeed" in str(row.get("framework")):  # its SwiGLU and rotary positions are eager
            found = replace(found, fused=0, fused_norm=1)
    if found is XLA and "pax" in told and "(TE)" not in str(row.get("precision")):  # XLA alone had no fused attention
        found = replace(XLA, flash=0)
    if found is NEMO_24 and "nemo-framework-launcher" in told:  # NVTE_FUSED_ATTN: 0, till 24.07 (its conf/config.yaml)
        found = replace(found, flash=1)
    extras = " ".join(row.get("extras", [])).lower()
    if "flash" in extras:
        found = replace(found, flash=0.5 if "flash attention 1" in extras else max(1, found.flash))
    if "flash attention 2" in extras:
        found = replace(found, flash=1)
    if "cross entropy of te" in extras:  # one kernel (transformer_engine/common/triton/cross_entropy.py)
        found = replace(found, lean_loss=1)
    if "plain attention" in extras:
        found = replace(found, flash=0)
    # NVIDIA reduces gradients in 16 bits in its own tables
    if "megatron-core by nvidia" in told or "gradients in 16 bits" in extras:
        found = replace(found, gradients=2, reduced=2)
    # Transformer Engine took cuDNN's attention by then
    if found.flash == 1 and re.search(r"megatron-core.*pytorch 2\.[5-9]", told):
        found = replace(found, flash=2)
    found = replace(found, remakes=REMAKES.get(_policy(row), 0))
    if "fused rmsnorm" in extras:
        found = replace(found, fused_norm=1)
    if "moments in 16 bits" in extras:
        found = replace(found, moments=4)
    if "gradients reduced once" in extras:
        found = replace(found, once=1)
    if "eager rmsnorm" in extras:
        found = replace(found, fused_norm=0)
    if "layers redistributed" in extras:
        found = replace(found, balanced=3)
    if _is_titan(row) and re.search(
        r"pytorch (2\.9|2\.1\d)", told
    ):  # RMSNorm is one kernel; cuDNN's attention is preferred
        found = replace(found, fused_norm=1, flash=3)
    if "compile" in extras:
        found = replace(found, fused=1)
        if _is_titan(row) and "2024" not in row.get("source", ""):  # the loss too, but in 2024 (its train.py)
            found = replace(found, logits=4)
    if "fp8 parameters" in extras:
        found = replace(found, gathers8=1)
    elif "fp8" in str(row.get("precision")) and re.search("megatron-(core|lm)", told) and "primus" not in told:
        # each weight twice in 8 bits, as it is and transposed, from one micro-batch to the next (NVIDIA's Transformer
        # Engine, module/base.py, is_first_microbatch), where weights themselves are not
        found = replace(found, copies8=2 * found.keeps8)
    if row["gpu"].startswith("GB200") and re.search(r"nemo 25\.0[2-7]", told):
        found = replace(found, products8=CUDA_12)
    if str(row.get("precision")).lower() == "mxfp8":  # not torchao's, of experts alone
        found = replace(found, products8=MXFP8 * found.products8)
    if "no tp comm overlap" in extras:
        found = replace(found, overlap_tp=0)
    elif "tp-comm-overlap" in extras or re.search(r"async[ -]?tp", extras):
        found = replace(found, overlap_tp=1)
    return _experts(row, told, found)


CUDA_12 = 0.84
"""Of GB200's rate of products in 8 bits by CUDA 13, what CUDA 12's cuBLAS reached: 2,620 to 2,910 TFLOP/s where sides have
8,192 and more (Azure/AI-benchmarking-guide, ND_GB200_v6_results.md, three versions), times 0.93, which is what training has
of H100's 1,290 to 1,380 there, and of 4,900 TFLOP/s."""

MXFP8 = 0.92
"""Of the rate that products in fp8 have with one scale for a tensor, MXFP8's, with one for 32 numbers: in Megatron-Bridge's
tables a step of the same dense model, layout and card takes 3 to 12 % longer, in the middle of seven pairs 6, and products
are 60 % of it."""

ZERO_3_2021 = 0.25
"""Of the network's rate, what DeepSpeed's ZeRO-3 had when it was new: Narayanan et al. 2021, table 2."""

BIASES = 28 / (2 * CONSTANTS.routing)
"""What biases of experts add to tokens' traffic: 28 bytes for each number, since kernels of their own multiply them by
probabilities in fp32, add them expert by expert, and join the parts (megatron/core/transformer/moe/experts.py)."""


def _experts(row: dict[str, Any], told: str, found: Software) -> Software:
    """How tokens get to their experts, and who launches that, as Megatron-Bridge's recipes have it."""
    found = replace(found, raises_again=int("mla_up_proj" in _modules(row)))
    recipe, blackwell = row.get("recipe", {}), row["gpu"].startswith(("GB", "B"))
    if recipe:
        found = replace(found, overlap_ep=int(bool(recipe.get("moe_a2a_overlap"))))
    elif "bridge" in told and blackwell:  # as its recipes of v0.2.0
        found = replace(found, overlap_ep=0, graphs=int(row["gpu"].startswith("GB")))
    if row.get("variant") == "tokendrop" and blackwell:
        found = replace(found, graphs=2)  # each expert gets as many tokens, so that no CPU has to know how many
    if "deepep" in told or recipe.get("moe_flex_dispatcher_backend"):
        found = replace(found, dedup=1, routing=min(FUSED, found.routing))
    if "permute fusion" in row.get("extras", []):
        found = replace(found, routing=min(FUSED, found.routing))
    if (container := re.search(r'"(2\d\.\d\d)', row.get("source", ""))) and float(container[1]) >= 26.06:
        found = replace(found, routing=0.2, graphs=2 if blackwell and row["model"].get("experts") else 0)
    if "bridge" in told and "GPT-OSS" in str(row["model"].get("name")):
        found = replace(found, routing=found.routing + BIASES)
    if "bridge" in told and row["model"].get("kv_lora"):  # DeepSeek's moments have 16 bits, and Kimi's Muon has one
        found = replace(found, moments=4)
    if graphs := recipe.get("cuda_graph_impl"):
        scope = str(recipe.get("cuda_graph_scope"))
        routes, whole = int("moe_preprocess" in scope), "full" in f"{graphs} {scope}"
        blocks = graphs != "none" and not (routes and "attn" not in scope)
        found = replace(found, graphs=2 if whole else int(blocks), graphs_route=routes)
    return found


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
        return flops / measured["mfu"] / (_cluster(row).peak_tflops * 1e12) / row["gpus"]
    return None
