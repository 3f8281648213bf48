"""The parts of a layout's text form, such as `fsdp4.tp2.sp.bf16`. Torch-free."""

from __future__ import annotations

import re

from weft.config.recompute import Recompute
from weft.schedules.orders import ORDERS

WORDS: dict[str, tuple[str, object]] = {
    "single": ("", None),
    "sp": ("sp", True),
    "asynctp": ("async_tp", True),
    "allgather": ("cp_kind", "allgather"),
    "ring": ("cp_kind", "ring"),
    "ulysses": ("cp_kind", "ulysses"),
    **{name: ("schedule", name) for name in ORDERS},
    "offload": ("offload", True),
    "offloadweights": ("offload_weights", True),
    "offloadoptimizer": ("offload_optimizer", True),
    "chunked": ("loss", "chunked"),
    "fp32": ("precision", "fp32"),
    "bf16": ("precision", "bf16"),
    "fp16": ("precision", "fp16"),
    "fp8": ("precision", "fp8"),
    "fp8row": ("precision", "fp8row"),
    "bf16grads": ("gradients", "bf16"),
    "compile": ("compile", True),
}
NUMBERS = {name: name for name in ("dp", "fsdp", "zero", "cp", "ep", "etp", "tp", "pp", "vp")} | {"mb": "micro_batch"}


def parse_part(part: str, text: str) -> tuple[str, object]:
    if part in WORDS:
        return WORDS[part]
    if (match := re.fullmatch(r"([a-z]+)(\d+)", part)) and match[1] in NUMBERS:
        return NUMBERS[match[1]], int(match[2])
    if match := re.fullmatch(r"csv\((.+\.csv)\)", part):
        return "schedule", match[1]
    if match := re.fullmatch(r"stages(\d+(?:-\d+)*)", part):
        return "stages", tuple(int(blocks) for blocks in match[1].split("-"))
    if re.match(r"(selective|full|keep-|redo-|fit)", part):
        Recompute.parse(part)
        return "recompute", part
    raise ValueError(
        f"layout {text!r}: {part!r} is not understood. Parts, joined by dots: dp2 fsdp2 zero1|2|3 cp2 ring|ulysses "
        "ep2 etp2 tp2 sp asynctp pp2 vp2 stages3-1 gpipe|1f1b|interleaved|bfs|zbh1|zbv|dualpipev|csv(FILE.csv) "
        "mb1 selective|full|redo-mlp|fit40g offload offloadweights|offloadoptimizer chunked bf16|fp16|fp8|fp8row "
        "bf16grads compile; or single"
    )
