"""Runs with as many features as fit, so that every two features meet in one: docs/features.md lists which.

Drawn by a greedy search for few runs that have all the pairs which no other test has; written down, so that they stay.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Compared, make
from test_parity import right

DENSE = {"ffn": 64}  # half of which is a multiple of 16 too
EXPERTS = {"num_kv_heads": 4, "head_dim": 16}
EVERY = EXPERTS | {"experts": {"num_experts": 4, "per_token": 4}}
"""Each token goes to every expert: no rounding can send it to another one, so low precisions compare as of dense models."""

PAIRS = [
    ("llama", "dp2.fsdp2.zero2.pp2.vp2.stages1-1-1-1.bfs.selective.offloadoptimizer.chunked.fp8row", "muon", True),
    ("llama", "fsdp2.cp2.pp2.stages3-1.gpipe.redo-mlp.bf16.bf16grads", "muon+8bit", False),
    ("llama", "cp2.ulysses.pp2.dualpipev.full.fp16", "muon+8bit", False),
    ("llama", "cp2.pp2.vp2.interleaved.selective.offloadoptimizer.fp8", "muon", True),
    ("mixtral", "fsdp2.zero1.ep2.tp2.sp.pp2.dualpipev.redo-mlp", "", False),
    ("llama", "cp2.ulysses.pp2.zbv.redo-mlp.offloadoptimizer", "muon", False),
    ("llama", "tp2.sp.pp2.gpipe.selective.fp16", "", False),
    ("llama", "dp2.fsdp2.pp2.vp2.interleaved.full.fp16", "", False),
    ("llama", "cp2.ring.pp2.zbh1.offloadoptimizer", "muon", False),
    ("llama", "dp2.cp2.ulysses.pp2.gpipe.fp8", "", False),
    ("mixtral", "cp2.ulysses.etp2.pp2.zbh1", "", False),
    ("llama", "cp2.pp2.vp2.bfs.fp8row", "", False),
    ("llama", "fsdp2.zero1.cp2.ring.pp2.vp2.interleaved", "", False),
    ("llama", "cp2.ring.pp2.dualpipev", "", False),
    ("llama", "cp2.ulysses.pp2.vp2.bfs", "", False),
    ("mixtral", "dp2.ep2.pp2.zbv", "", False),
    ("llama", "dp2.fsdp2.cp2.ulysses", "", False),
    ("llama", "dp2.fsdp2.cp2.ring", "", False),
    ("llama", "dp2.fsdp2.pp2.gpipe", "", False),
    ("llama", "dp2.fsdp2.cp2", "", False),
    ("llama", "dp2.fsdp2.tp2.sp", "", False),
    (
        "mixtral",
        "cp2.ulysses.ep2.etp2.tp2.sp.pp2.vp2.stages1-1-1-1.interleaved.redo-mlp.offloadoptimizer.chunked",
        "",
        True,
    ),
    ("llama", "fsdp2.zero1.pp2.stages3-1.gpipe.full.offloadoptimizer.chunked.bf16.bf16grads", "", True),
    ("mixtral", "fsdp2.zero2.cp2.ring.ep2.etp2.pp2.stages3-1.zbh1.mb2.full.chunked", "8bit", True),
    ("mixtral", "dp2.fsdp2.zero2.ep2.etp2.pp2.stages1-1-1-1.dualpipev.redo-mlp.offloadoptimizer.chunked", "", True),
    ("llama", "fsdp2.zero1.tp2.sp.pp2.vp2.stages1-1-1-1.bfs.redo-mlp.fp8", "8bit", False),
    ("mixtral", "fsdp2.zero1.etp2.pp2.zbv.selective.chunked", "8bit", True),
    ("llama", "cp2.ring.pp2.vp2.stages1-1-1-1.bfs.full.offloadoptimizer.fp16", "", True),
    ("llama", "cp2.ring.pp2.gpipe.redo-mlp.fp8row", "8bit", False),
    ("llama", "tp2.sp.pp2.dualpipev.selective.bf16.bf16grads", "", False),
    ("mixtral", "fsdp2.zero1.ep2.fp8row", "", False),
    ("mixtral", "dp2.ep2.redo-mlp.fp16", "", False),
    ("llama", "fsdp2.zero2.cp2.ring.pp2.stages1-1-1-1.zbv.bf16.bf16grads", "", False),
    ("mixtral", "dp2.cp2.ep2.etp2.pp2.gpipe", "", False),
    ("llama", "cp2.ulysses.pp2.vp2.interleaved.fp8row", "8bit", False),
    ("llama", "cp2.ulysses.pp2.zbh1.redo-mlp.bf16.bf16grads", "", False),
    ("llama", "pp2.vp2.bfs.bf16.bf16grads", "", False),
    ("llama", "dp2.fsdp2.fp8", "8bit", False),
    ("mixtral", "dp2.ep2.pp2.vp2.bfs", "", False),
    ("llama", "pp2.bf16.bf16grads", "", False),
    ("mixtral", "dp2.etp2.pp2.vp2.bfs", "", False),
    ("mixtral", "dp2.etp2.pp2", "", False),
    ("llama", "dp2.fsdp2.pp2.zbh1", "", False),
    ("llama", "dp2.fsdp2.zero2.offload.offloadoptimizer.fp16", "muon", True),
    ("llama", "cp2.pp2.dualpipev.offload.fp8row.bf16grads", "8bit", False),
    ("llama", "cp2.ulysses.pp2.stages3-1.gpipe.offload", "", False),
    ("llama", "pp2.vp2.bfs.offload", "", False),
    ("llama", "fsdp2.pp2.zbh1.offload.fp8", "", False),
    ("llama", "fsdp2.pp2.zbh1.fp8row", "", False),
    ("llama", "dp2.pp2.zbv.fp8", "", False),
    ("llama", "pp2.dualpipev.fp8", "", False),
    ("llama", "fsdp2.zero1.cp2.tp2.sp.asynctp.full.bf16.bf16grads", "muon+8bit", True),
    ("llama", "fsdp2.zero2.tp2.sp.asynctp.pp2.stages3-1.gpipe.offloadoptimizer.chunked.fp16", "", False),
    ("llama", "dp2.fsdp2.tp2.sp.asynctp.mb2.offload", "", False),
    ("mixtral", "cp2.ring.ep2.etp2.tp2.sp.asynctp.pp2.vp2.interleaved", "", False),
    ("llama", "cp2.ulysses.tp2.sp.asynctp.pp2.vp2.bfs", "", False),
    (
        "llama",
        "dp2.fsdp2.zero2.pp2.vp2.stages1-1-1-1.bfs.selective.offload.offloadweights.chunked.fp8row",
        "muon",
        True,
    ),
    ("mixtral", "fsdp2.zero1.cp2.ring.ep2.etp2.pp2.zbh1.mb2.full.offloadweights", "8bit", False),
    ("llama", "fsdp2.tp2.sp.pp2.zbv.redo-mlp.offloadweights.fp16", "", False),
    ("llama", "fsdp2.cp2.ulysses.pp2.dualpipev.offloadweights.bf16.bf16grads", "", False),
    ("llama", "fsdp2.cp2.pp2.vp2.interleaved.offloadweights.fp8", "", False),
    ("llama", "fsdp2.tp2.sp.asynctp.pp2.gpipe.offloadweights", "", False),
    ("llama", "fsdp2.pp2.offloadweights", "", False),
    ("every", "dp2.etp2.mb2.bf16.bf16grads", "", False),
    ("every", "tp2.sp.ep2.etp1.bf16", "", False),
    ("every", "tp2.etp1.mb4.bf16.bf16grads", "", False),  # only experts have copies
    ("every", "dp2.etp2.fp16", "", False),
    ("every", "tp2.etp2.fp8", "", False),
    ("every", "fsdp2.etp2.fp8row", "", False),
]
MODELS = {"llama": ("llama", DENSE), "mixtral": ("mixtral", EXPERTS), "every": ("mixtral", EVERY)}
COMPILED = [
    ("llama", "dp2.fsdp2.zero1.offloadoptimizer.chunked.fp16.compile", "muon", True),
    ("llama", "pp2.stages3-1.gpipe.fp8.bf16grads.compile", "8bit", False),
    ("llama", "pp2.vp2.interleaved.bf16.compile", "", False),
    ("llama", "pp2.vp2.bfs.compile", "", False),
    ("llama", "tp2.sp.pp2.zbv.fp8row.compile", "", False),
    ("mixtral", "dp2.etp2.compile", "muon", False),
    ("llama", "fsdp2.mb4.offloadweights.compile", "", False),
]
OPTIMIZERS = {"muon": {"kind": "muon"}, "8bit": {"states": "8bit"}}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout", "optimizer", "masked"), PAIRS)
def test_pairs(model: str, layout: str, optimizer: str, masked: bool, documents: Path, compared: Compared) -> None:
    family, changes = MODELS[model]
    over: dict = {"model": changes, "optimizer": {}}
    for name in optimizer.split("+") if optimizer else []:
        over["optimizer"] |= OPTIMIZERS[name]
    if masked:
        over["data"] = {"paths": [str(documents)], "document_mask": True, "split": (1, 0, 0)}
    right(compared(make(family, layout, **over)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("model", "layout", "optimizer", "masked"), COMPILED)
def test_compiled(model: str, layout: str, optimizer: str, masked: bool, documents: Path, compared: Compared) -> None:
    test_pairs(model, layout, optimizer, masked, documents, compared)
