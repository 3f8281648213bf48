"""Arguments as older Megatrons and Megatron-DeepSpeed have them, as those of today. Torch-free.

Names: Megatron-LM's history of megatron/arguments.py since 2019, and Megatron-DeepSpeed's megatron/arguments.py.
"""

from __future__ import annotations

from weft.plan.emit.shell import Options

RENAMED = {
    "--model-parallel-size": "--tensor-model-parallel-size",
    "--batch-size": "--micro-batch-size",
    "--layernorm-epsilon": "--norm-epsilon",
    "--num-key-value-heads": "--num-query-groups",
    "--warmup": "--lr-warmup-fraction",
    "--topk": "--moe-router-topk",
}
"""The same value, under another name."""
MEANT: dict[str, Options] = {
    "--use-rotary-position-embeddings": {"--position-embedding-type": ["rope"]},
    "--recompute-activations": {"--recompute-granularity": ["selective"]},
    "--checkpoint-activations": {"--recompute-granularity": ["full"], "--recompute-method": ["uniform"]},
    "--no-pipeline-parallel": {"--pipeline-model-parallel-size": ["1"]},
}
"""A switch, and what it stands for."""


def today(there: Options) -> None:
    """Put today's arguments in the place of older ones; where both are there, today's count."""
    for old, new in RENAMED.items():
        if old in there:
            there.setdefault(new, there.pop(old))
            if new == "--num-query-groups":
                there.setdefault("--group-query-attention", [])
    for old, meant in MEANT.items():
        if there.pop(old, None) is not None:
            for name, values in meant.items():
                there.setdefault(name, list(values))
    for name in ("--checkpoint-num-layers", "--activations-checkpoint-num-layers"):
        if there.get("--recompute-granularity") == ["full"] and name in there:
            there.setdefault("--recompute-num-layers", there.pop(name))
    if there.get("--normalization") == ["rmsnorm"]:
        there["--normalization"] = ["RMSNorm"]
    if there.get("--position-embedding-type") == ["rotary"]:
        there["--position-embedding-type"] = ["rope"]
    if there.get("--num-experts") == ["1"] and "--deepspeed" in there:  # its word for no experts
        del there["--num-experts"]
