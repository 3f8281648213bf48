"""LoRA adapters as peft writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint.tensors import TensorFile
from weft.models.places import places
from weft.models.shape import Shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

Pair = tuple[Tensor, Tensor]
"""A [r, I] and B [O, r], the latter with the adapter's scale: a product W x has B (A x) added."""

PLAIN = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "lora_bias": False, "alora_invocation_tokens": None, "target_parameters": None,
}  # fmt: skip
"""Settings that change more than a pair of matrices for each module, and what they must be."""


def load_adapter(folder: Path, shape: Shape) -> dict[str, Pair]:
    """Module of weft's model → its pair in fp32.

    Raises:
        ValueError: the folder holds no such adapter, one of another kind, or of another model.
    """
    scale = _scale(folder)
    sites: dict[str, list[tuple[str, int, int, int]]] = {}
    for name, place in places(shape).items():  # several of weft's matrices may be one there: GPT-2's q, k and v
        if name.endswith(".weight") and len(place.weft_sizes) == 2:
            out, inner = place.weft_sizes
            found = sites.setdefault(place.tensor.removesuffix(".weight"), [])
            found.append((name.removesuffix(".weight"), place.offset, out, inner))
    pairs: dict[str, Pair] = {}
    with TensorFile(folder / WEIGHTS) as file:
        left = set(file.entries)
        for module, parts in sites.items():
            names = [f"{PREFIX}{module}.lora_{matrix}.weight" for matrix in "AB"]
            if not left.issuperset(names):
                continue
            left -= set(names)
            a, b = (file.read(name).float() for name in names)
            total = sum(out for _, _, out, _ in parts)
            if a.shape[1:] != (parts[0][3],) or b.shape != (total, len(a)):
                raise ValueError(
                    f"{folder}: the pair of {module} is {tuple(a.shape)} and {tuple(b.shape)}, but the model's matrix "
                    f"is {total} × {parts[0][3]}: the adapter belongs to another model"
                )
            for name, offset, out, _ in parts:
                pairs[name] = (a, scale * b[offset : offset + out])
    if left:
        raise ValueError(
            f"{folder}: the model has nothing for {sorted(left)[0]} and {len(left) - 1} more: adapters may change the "
            "matrices of attention and MLPs, not experts, embeddings or the head"
        )
    return pairs


def _scale(folder: Path) -> float:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the directory that peft's save_pretrained wrote")
    settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {settings.get('peft_type')}; weft serves LORA")
    for name, value in PLAIN.items():
        if (found := settings.get(name)) and found != value:
            raise ValueError(
                f"{folder}: {name} is {found}, which weft does not serve; merge the adapter into the model"
            )
    rank, alpha = settings["r"], settings["lora_alpha"]
    return float(alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank)
