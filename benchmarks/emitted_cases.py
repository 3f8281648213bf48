"""The rows of emitted.py: small models, layouts, schedules, and settings as other people write them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.config.load import make_config
from weft.config.tree import Config
from weft.plan.emit import systems

STEPS, BATCH, SEQ, PEAK = 12, 8, 64, 3e-3
SIZES = {"num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 160, "vocab": 256, "max_seq": SEQ}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "family": "llama"},
    "qwen3": {**SIZES, "family": "qwen3", "head_dim": 32, "tied": False},
    "gpt2": {"num_layers": 4, "hidden": 64, "num_heads": 4, "vocab": 256, "max_seq": SEQ, "family": "gpt2"},
}


@dataclass(frozen=True)
class Case:
    system: str
    layout: str
    model: str = "llama"
    schedule: dict[str, Any] = field(default_factory=lambda: {"kind": "cosine", "warmup": 4})
    optimizer: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] | None = None  # a file of others, instead of weft's own

    @property
    def empty_steps(self) -> int:
        """Of Adam, before the first: where the remarks say so."""
        return int(self.system == "deepspeed" and self.layout.startswith("dp") and "16" in self.layout)

    @property
    def name(self) -> str:
        words = [self.system, *(["read"] if self.read else []), self.model, self.layout, self.schedule["kind"]]
        words += [
            f"warmup{self.schedule.get('warmup', 0)}",
            *(f"{key}={value}" for key, value in self.optimizer.items()),
        ]
        return " ".join(words)


LINE, FLAT = {"kind": "linear", "warmup": 4}, {"kind": "constant", "warmup": 5}
OTHERS: list[dict[str, Any]] = [
    {
        "train_batch_size": 8,
        "steps_per_print": 2000,
        "optimizer": {"type": "Adam", "params": {"lr": PEAK, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": PEAK, "warmup_num_steps": 4}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
    },
    {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": PEAK}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": STEPS, "warmup_min_lr": 0, "warmup_max_lr": PEAK, "warmup_num_steps": 4,
                "warmup_type": "linear",
            },
        },
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    },
]  # fmt: skip
CASES = [
    Case("deepspeed", "dp2"),
    Case("deepspeed", "dp2.mb2", "gpt2"),
    Case("deepspeed", "dp2", schedule=LINE),
    Case("deepspeed", "dp2", schedule=FLAT),
    Case("deepspeed", "dp2", schedule={"kind": "cosine"}),
    Case("deepspeed", "dp2", schedule={"kind": "constant"}, optimizer={"clip_norm": 0}),
    Case("deepspeed", "fsdp2.zero1.mb2"),
    Case("deepspeed", "fsdp2.zero2.mb2"),
    Case("deepspeed", "fsdp2"),
    Case("deepspeed", "fsdp2.mb1", "gpt2"),
    Case("deepspeed", "fsdp2.mb2", "qwen3", schedule=LINE, optimizer={"clip_norm": 0.3}),
    Case("deepspeed", "fsdp2.mb2.offloadoptimizer"),
    Case("deepspeed", "fsdp2.mb2.offloadweights"),
    Case("deepspeed", "dp2.mb2.bf16"),
    Case("deepspeed", "fsdp2.zero1.mb2.bf16"),
    Case("deepspeed", "fsdp2.mb2.bf16"),
    Case("deepspeed", "fsdp2.mb2.bf16.bf16grads"),
    Case("deepspeed", "dp2.fp16"),
    Case("deepspeed", "dp2", read=OTHERS[0]),
    Case("deepspeed", "fsdp2.zero2.mb2", read=OTHERS[1]),
    Case("torchtitan", "fsdp2"),
    Case("torchtitan", "fsdp2.zero2.mb2", schedule=LINE),
    Case("torchtitan", "fsdp2.mb1", schedule={"kind": "wsd", "warmup": 3, "decay": 6}),
    Case("torchtitan", "fsdp2.mb2", "qwen3", schedule=FLAT, optimizer={"clip_norm": 0}),
    Case("torchtitan", "fsdp2.mb2.full", schedule={"kind": "cosine"}),
    Case("torchtitan", "fsdp2.mb2.bf16"),
    Case("torchtitan", "dp2"),
    Case("torchtitan", "tp2.sp"),
    Case("torchtitan", "tp2.sp.mb4", schedule=LINE),
    Case("torchtitan", "pp2.mb2", optimizer={"clip_norm": 2.0}),
    Case("torchtitan", "pp2.gpipe.mb2"),
    Case("torchtitan", "pp2.vp2.interleaved.mb2"),
    Case("torchtitan", "dp2.fsdp2.mb1"),
    Case("torchtitan", "fsdp2.pp2.mb1", schedule=LINE),
]


def settings(case: Case, folder: Path, start: Path | None) -> Config:
    tree: dict[str, Any] = {
        "model": MODELS[case.model],
        "layout": case.layout,
        "optimizer": {"lr": PEAK, **case.optimizer},
        "schedule": case.schedule,
        "train": {"steps": STEPS, "global_batch": BATCH, "seq": SEQ},
    }
    if case.read:
        (folder / "others.json").write_text(json.dumps(case.read), encoding="utf-8")
        found, unknown = systems.read(folder / "others.json", make_config(tree).model, gpus=2)
        print(f"    not understood: {', '.join(unknown)}") if unknown else None
        tree = found.model_dump(mode="json") | {"layout": str(found.layout)}
        tree["train"] |= {"steps": max(found.train.steps if found.train.steps < 1000 else 0, STEPS), "seq": SEQ}
    tree["train"] |= {"device": "cpu", "init_from": str(start) if start else None}
    data = {"paths": [str(folder.parent / "tokens")]}
    return make_config(tree | {"run": str(folder / "run"), "data": data, "log": {"view": "off", "tensorboard": False}})
