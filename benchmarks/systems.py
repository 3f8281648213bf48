"""What the systems do that published runs were trained with: a row's framework, set, source, recipe and extras → Software.

Each with where that stands in the system's source or page; what was fitted is said to be.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf
from typing import Any

import nanotron
from weft.plan.time.constants import CONSTANTS
from weft.plan.work import Software

MEGATRON_21 = Software(flash=0, overlap_dp=0, blocking=1, dropout=1, gradients=4, reduced=2, softmax=4096)
NEMO_22 = replace(MEGATRON_21, overlap_dp=1, gradients=2)
MEGATRON_CORE = Software(flash=2, overlap_tp=1, overlap_pp=1, gradients=2, reduced=2, least=4.3e-3, softmax=4096)
# its own buckets (core/distributed/distributed_data_parallel.py), which grow with the replicas since spring 2024; those of
# NeMo and Bridge are of 128 Mi, a block or so
BUCKETS = {"bucket": 40e6, "bucket_each": 1e6}
MEGATRON_24 = replace(MEGATRON_CORE, flash=1)  # before Transformer Engine preferred cuDNN's attention, mid-2024
MEGATRON_25 = replace(MEGATRON_CORE, flash=3, keeps8=1, weighs=1)  # with the cuDNN of December 2024 and later
# all get all gradients: its ZeRO 1 and 2 reduce them whole, and so does its optimizer for bf16 (stage_1_and_2.py,
# bf16_optimizer.py)
MEGATRON_DS = replace(MEGATRON_21, reduced=2, adds=1, whole_dp=1)
NEMO_24 = replace(MEGATRON_CORE, master=2)  # Apex keeps the 16 bits that bf16 weights lack
TORCH = Software(fused=0, weights=4, gradients=4, master=0, reduced=4, stops=1)
TORCH_LOSS = replace(TORCH, logits=12)
# exponents in fp32, gradients in 16 bits (MaxText, max_utils.py)
XLA = replace(MEGATRON_CORE, least=0, softmax=inf, overlap_tp=0, logits=6, stops=1)
COMPILED = replace(TORCH, fused=1)
# gradients in 16 bits, reduced whole in fp32 when all is done; send and recv; uniform stages; beside torch's loss this
# micro-batch's logits and those before stay in buffers (its core/optimizer, core/nn/parallel_module); under sp norms gather
# what they give, and it is kept whole (core/nn/norm/rms_norm.py)
SCALING = Software(
    fused=0, flash=0, logits=16, overlap_dp=0, blocking=1, balanced=2, adds=1, whole_head=1, whole_dp=1, gradients=2,
    keeps_gathered=1, softmax=2048,
)  # fmt: skip
INTERN_EVO = Software(  # Apex's RMSNorm
    blocking=1, fused=0, fused_norm=1, overlap_dp=0.5, reduced=2, gradients=2, adds=1, turns=2.5e-3,
)  # fmt: skip
DEEPSPEED = replace(MEGATRON_21, reduced=2, overlap_dp=0.5)
# norms and activations of transformers' LLaMA are eager
DEEPSPEED_HF = replace(DEEPSPEED, fused=0, dropout=0, softmax=inf)
FUSED = 0.49  # of the traffic of dealing tokens out, where permutations are fused (--moe-permute-fusion): fitted
SOFTWARE: tuple[tuple[str, Software], ...] = (
    ("nanotron", nanotron.NANOTRON), ("MaxText", XLA), ("AA-Scaling", SCALING),
    ("llm-foundry", replace(TORCH, logits=4, stops=0)),  # PyTorch before 2.1
    ("fms-fsdp", replace(TORCH, fused=1, reduced=2)),
    ("torchtitan", replace(TORCH_LOSS, alternate=1, gathers8=1)),
    ("InternEvo", INTERN_EVO),
    ("vTrain", replace(MEGATRON_21, fused=0, adds=1, gradients=2)),
    # SwiGLU and rotary positions in PyTorch's own operations, and no fusion of gradients' sums, which stay in fp32
    # (megatron/model/transformer.py, arguments.py, examples/LLaMA)
    ("Megatron-LLaMA", replace(MEGATRON_21, fused=0, fused_norm=1, dropout=0, adds=1, reduced=4)),
    ("Megatron-DeepSpeed", MEGATRON_DS),
    ("ATorch, DeepSpeed", DEEPSPEED_HF), ("Hugging Face's LLaMA", DEEPSPEED_HF),  # the former: its ds_3d_llama2.py
    ("DeepSpeed", DEEPSPEED),
    # as the configs that its page names
    ("PaddleNLP", replace(MEGATRON_21, fused=0, fused_norm=2, dropout=0, softmax=inf)),
    ("2021-01", replace(MEGATRON_21, whole_pp=1)), ("Smith et al. 2022", replace(MEGATRON_21, whole_pp=1, adds=1)),
    ("AutoModel", replace(TORCH, fused=1, flash=3, weights=2, gradients=2, master=0, moments=4, reduced=2)),
    ("SimuMax", Software(flash=2, overlap_dp=0)),
    ("NeMo Megatron 22", NEMO_22), ("NeMo 24.12", replace(NEMO_24, flash=3)), ("NeMo 25", MEGATRON_25),
    ("NeMo 24.", NEMO_24), ("nemo-24", NEMO_24),
    ("DeepSeek-V3 README", replace(MEGATRON_CORE, overlap_ep=1, dedup=1)),
    # its recipes' cross entropy is Transformer Engine's (scripts/performance/utils/overrides.py), which writes gradients
    # where the logits were
    ("Bridge", replace(MEGATRON_25, overlap_ep=1, dedup=1, routing=FUSED, logits=2)),
    ("dgxc", MEGATRON_CORE), ("NeMo", MEGATRON_CORE),
    ("ModelZoo", replace(MEGATRON_25, **BUCKETS)), ("mcore", replace(MEGATRON_24, **BUCKETS)),
    # its configurations for MI300X
    ("Primus", replace(MEGATRON_25, gradients=4, reduced=4, overlap_tp=0, adds=1, **BUCKETS)),
    ("Megatron-Core 2025", replace(MEGATRON_25, gradients=4, reduced=4, **BUCKETS)),
    ("Megatron-Core", replace(MEGATRON_24, gradients=4, reduced=4, **BUCKETS)),
    ("JAX", XLA), ("pax", XLA), ("Levanter", XLA), ("EasyLM", XLA),
    ("TinyLlama", COMPILED), ("litgpt", COMPILED), ("lit-gpt", COMPILED), ("OLMo", COMPILED), ("torchtune", COMPILED),
    ("Kempner", replace(TORCH_LOSS, flash=2, weights=2, gradients=2, moments=4, reduced=2, whole_head=1)),
    ("Transformer Engine", replace(COMPILED, flash=2, keeps8=1, reduced=2)),
    ("PyTorch", TORCH_LOSS), ("FSDP", TORCH_LOSS), ("accelerate", TORCH_LOSS), ("transformers", TORCH_LOSS),
    ("Megatron-LM", MEGATRON_21), ("Narayanan", MEGATRON_21), ("Korthikanti", MEGATRON_21),
)  # fmt: skip
"""A word of the row's set, framework or source → what that software does. The first that is found counts."""

REMAKES = {
    "save_dot_with_context_except_mlp": 1,
    "save_dot_except_mlp": 2,
    "save_dot_except_mlpwi": 2,
    "save_qkv_proj": 3,
}
"""MaxText's policies of remat: what of a block they make again."""


def policy(row: dict[str, Any]) -> str:
    """As the row says; else as NVIDIA's recipes for MaxText had it (dgxc-benchmarking, maxtext/configure.sh)."""
    source = row.get("source", "")
    told = row.get("remat_policy") or ("maxtext/" in source and "dgxc" in source and "save_qkv_proj")
    return "save_dot_except_mlp" if told and "v24.11" in source else str(told or "")


def modules(row: dict[str, Any]) -> list[str]:
    """What Megatron-Core's selective recomputation is told to compute again."""
    return [str(name) for name in row.get("recipe", {}).get("recompute_modules", [])]


def redone(row: dict[str, Any]) -> list[str]:
    """The parts of a block that are computed again as a whole. Norms and activations, which may be named beside them, are
    parts of these."""
    told = str(row.get("recompute") or "")
    named = {*modules(row), *(re.split("[, ]+", told.partition(":")[2]) if told.startswith("selective:") else ())}
    mlp = {"moe"} if row["model"].get("experts") else {"mlp"}  # a mixture's "mlp" is that of its few dense blocks
    parts = {"attention": {"attn"}, "mlp": mlp, "experts": {"moe_expert"}}
    return [part for part, names in parts.items() if named & names]


def is_titan(row: dict[str, Any]) -> bool:
    return "torchtitan" in f"{row.get('framework')} {row.get('set')} {row.get('source')}".lower()


def _has_bf16_optimizer(row: dict[str, Any]) -> bool:
    """DeepSpeed's for bf16 without ZeRO, and of pipelines in it: states are shared among replicas (bf16_optimizer.py)."""
    named = row.get("framework") == "Megatron-DeepSpeed" and row.get("precision") == "bf16"
    return named and (not row.get("zero_stage") or (row.get("pp") or 1) > 1)


def _is_bloom(row: dict[str, Any]) -> bool:
    return any(word in f"{row.get('set')} {row.get('source')}".lower() for word in ("bloom", "tr11"))


def since_hopper(row: dict[str, Any]) -> bool:
    """Of 2022 and later, as is software that nothing is told of."""
    return not any(word in row["gpu"] for word in ("A100", "V100", "MI250"))


def zero_of(row: dict[str, Any]) -> int:
    """As the row says; but torchtitan's pipelines keep gathered weights, and add up whole gradients, to the step's end."""
    zero = row.get("zero_stage")
    if zero is None:
        return 3 if row.get("fsdp") else int(since_hopper(row))
    if zero == 0 and _has_bf16_optimizer(row):
        return 1
    return 1 if zero == 3 and is_titan(row) and (row.get("pp") or 1) > 1 else zero


def software_of(row: dict[str, Any]) -> Software:
    told = f"{row.get('framework') or ''} {row.get('set', '')} {row.get('framework_version') or ''} {row.get('source', '')}"
    default = MEGATRON_CORE if since_hopper(row) else MEGATRON_21
    told = told.lower().replace("nemotron", "")  # a model, not NeMo
    found = next((software for word, software in SOFTWARE if word.lower() in told), default)
    if found is MEGATRON_21 and since_hopper(row):
        found = replace(MEGATRON_CORE, gradients=4, reduced=4, **BUCKETS) if "megatron-lm" in told else MEGATRON_CORE
    if found is nanotron.NANOTRON:
        found = nanotron.software(row)
    if found.flash == 1 and any(word in row["gpu"] for word in ("B200", "B300")):
        found = replace(found, flash=2)  # FlashAttention-2 is none of Blackwell's
    if found is MEGATRON_DS and row.get("precision") == "fp16":  # added up as they are; its own share of them in fp32
        found = replace(found, gradients=2, master=8)
    elif found is DEEPSPEED and zero_of(row) == 3:
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
    if "cross entropy of te" in extras:  # one kernel (transformer_engine/common/triton/cross_entropy.py), but for a
        # penalty of logits' sums, which is made of them and their gradients apart
        found = replace(found, lean_loss=int("z-loss" not in extras), logits=2)
    if row.get("kernel") == "torch":
        found = replace(found, softmax=0)
    if "plain attention" in extras:
        found = replace(found, flash=0)
    # NVIDIA reduces gradients in 16 bits in its own tables
    if "megatron-core by nvidia" in told or "gradients in 16 bits" in extras:
        found = replace(found, gradients=2, reduced=2)
    # Transformer Engine took cuDNN's attention by then
    if found.flash == 1 and re.search(r"megatron-core.*pytorch 2\.[5-9]", told):
        found = replace(found, flash=2)
    found = replace(found, remakes=REMAKES.get(policy(row), 0))
    if "fused rmsnorm" in extras:
        found = replace(found, fused_norm=1)
    if "gradients in 32 bits" in extras:  # Megatron-Bridge's plain recipes (recipes/common.py), not those of its tables
        found = replace(found, gradients=4, reduced=4)
    if "weights in 16 bits" in extras:
        # and all that torch makes of them, but what FSDP reduces; DDP has each gradient in a bucket, too
        # (gradient_as_bucket_view=False)
        held, reduced = (2, 4) if row.get("fsdp") else (4, 2)
        found = replace(found, weights=2, gradients=held, master=0, moments=4, reduced=reduced)
    if "moments in 16 bits" in extras:
        found = replace(found, moments=4)
    if "precision-aware optimizer" in extras:
        # the 16 bits that weights lack (core/optimizer/__init__.py, store_param_remainders)
        found = replace(found, master=2)
    if "overlapped optimizer" in extras:  # in buckets of parameters (megatron/optimizer/overlapped_dist_optimizer.py)
        found = replace(found, overlap_dp=1, bucket=4e8)
    if "gradients reduced once" in extras:
        found = replace(found, once=1)
    if "eager rmsnorm" in extras:
        found = replace(found, fused_norm=0)
    if "layers redistributed" in extras:
        found = replace(found, balanced=3)
    if is_titan(row) and re.search(
        r"pytorch (2\.9|2\.1\d)", told
    ):  # RMSNorm is one kernel, cuDNN's attention preferred
        found = replace(found, fused_norm=1, flash=3)
    if "compile" in extras:
        found = replace(found, fused=1)
        if is_titan(row) and "2024" not in row.get("source", ""):  # the loss too, but in 2024 (its train.py)
            found = replace(found, logits=4)
    if is_titan(row) and not found.fused:
        found = replace(found, tp_host=DISPATCHED)
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
    if "2023" in str(row.get("framework")):
        found = replace(found, bucket_each=0)
    if "no tp comm overlap" in extras:
        found = replace(found, overlap_tp=0)
    elif "tp-comm-overlap" in extras or re.search(r"async[ -]?tp", extras):
        found = replace(found, overlap_tp=1)
    if row["gpu"].startswith("G"):
        found = replace(found, least=GRACE * found.least)
    return _experts(row, told, found)


GRACE = 1.2
"""Times the other CPUs' time for a block, that Grace's slower cores take: Qwen3-14B, its products cut in 4, takes 5.2 ms
for a block's micro-batch of 512, 1,024 and 2,048 tokens alike (gipfelsturm-more)."""

DISPATCHED = 14e-3
"""Seconds that a CPU takes more for a block cut by torchtitan's tp, where nothing is compiled and each operation goes
through DTensor: Llama 3's 8B and 70B, cut in 8, both take 18 ms for a block, recomputation with it (titan-h200)."""

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
    found = replace(found, raises_again=int("mla_up_proj" in modules(row)))
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
    container = re.search(r'"(2\d\.\d\d)', row.get("source", ""))
    since_2606 = container is not None and float(container[1]) >= 26.06
    if since_2606 or "fused grouped MLP" in row.get("extras", []):
        found = replace(found, routing=0.2, graphs=2 if blackwell and row["model"].get("experts") else 0)
    if "bridge" in told and "GPT-OSS" in str(row["model"].get("name")):
        found = replace(found, routing=found.routing + BIASES)
    if "bridge" in told and row["model"].get("kv_lora"):  # DeepSeek's moments have 16 bits, and Kimi's Muon has one
        found = replace(found, moments=4)
    if graphs := recipe.get("cuda_graph_impl"):
        scope = str(recipe.get("cuda_graph_scope"))
        routes, whole = int("moe_preprocess" in scope), "full" in f"{graphs} {scope}"
        blocks = graphs != "none" and not (routes and "attn" not in scope)
        # a graph of the whole iteration has buffers of fixed size, for 1.2 even shares (set_full_iter_cg_configs,
        # moe_paged_stash_buffer_size_factor_cuda)
        stash = 1.2 if "bridge" in told and whole and row["model"].get("experts") else 1
        found = replace(found, graphs=2 if whole else int(blocks), graphs_route=routes, stash=stash)
    return found
