"""Settings drawn at random, of all that are accepted, compute what one process computes.

WEFT_EXAMPLES=1000 python -m pytest tests/parallel/test_drawn.py    # half an hour; others each time
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import MODELS, Compared, make
from hypothesis import given
from hypothesis import strategies as st
from test_pairs import DENSE, EVERY, EXPERTS
from test_parity import right

from draws import draws
from weft.config.layout import Layout
from weft.config.tree import Config
from weft.schedules.orders import ORDERS

CHANGES = {"llama": DENSE, "mixtral": EXPERTS, "every": EVERY}
LOW = ("gpt2", "llama", "every")
"""Models that low precisions compare of: rounding sends none of their tokens to another expert."""
RECOMPUTE = (
    "none", "none", "full", "full/2", "full:1", "selective", "selective/2", "keep-attention", "keep-matmul",
    "keep-attention+network", "redo-mlp", "redo-mlp:1", "redo-attention", "redo-attention+mlp", "redo-experts",
)  # fmt: skip
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {}, {"kind": "muon"}, {"states": "8bit"}, {"kind": "muon", "states": "8bit"}, {"clip_norm": 0.05}, {"clip_norm": 0.0},
)  # fmt: skip
BALANCES: tuple[dict[str, float], ...] = (
    {}, {"sequence": 1e-2}, {"z": 1e-2}, {"sequence": 1e-2, "z": 1e-3}, {"capacity": 1.5}, {"bias_speed": 1e-2},
)  # fmt: skip
Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def accepted(draw: Draw, documents: Path) -> Config | None:
    """Settings of 2 to 8 processes; None where these refuse each other."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    model = one(*MODELS, "every")
    mixture = model in ("mixtral", "deepseek", "every")
    fields = {axis: one(1, 1, 2, 4) for axis in ("dp", "fsdp", "cp", "tp", "pp")}
    rare = {name: one(False, False, False, True) for name in ("offload", "offload_weights", "offload_optimizer")}
    fields |= rare | {"recompute": one(*RECOMPUTE), "loss": one("whole", "chunked"), "micro_batch": one(None, 1, 2, 4)}
    if fields["fsdp"] > 1:
        fields["zero"] = one(1, 2, 3)
    if fields["cp"] > 1:
        fields["cp_kind"] = one("allgather", "ring", "ulysses")
    if fields["tp"] > 1:
        fields["sp"] = one(False, True)
        fields["async_tp"] = fields["sp"] and one(False, False, True)
    if fields["pp"] > 1:
        fields["schedule"], fields["vp"] = one(*ORDERS), one(1, 2)
    if mixture:
        fields["ep"], fields["etp"] = one(1, 2, 4), one(None, 1, 2)
    if model in LOW:
        fields["precision"] = one("fp32", "fp32", "bf16", "fp16", "fp8", "fp8row")
        fields["gradients"] = "fp32" if fields["precision"] in ("fp32", "fp16") else one("fp32", "bf16")
    over = {
        "model": CHANGES.get(model, {}),
        "optimizer": one(*OPTIMIZERS),
        "balance": one(*BALANCES) if mixture else {},
        "data": one({}, {"paths": [str(documents)], "document_mask": True, "split": (1, 0, 0)}),
    }
    try:
        layout = Layout(**fields)
        return make("mixtral" if model == "every" else model, str(layout), **over) if 1 < layout.world <= 8 else None
    except ValueError:
        return None


@pytest.mark.slow
@draws(12)
@given(data=st.data())
def test_whatever_is_accepted(data: st.DataObject, documents: Path, compared: Compared) -> None:
    right(compared(data.draw(accepted(documents).filter(bool))))
