"""What is away, what stays, and what is let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from weft.config.layout import Layout
from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.parallel import offload
from weft.parallel.offload import Load, offload_blocks
from weft.plan.memory.activations import Pass

SHAPE = Shape(num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, ffn=160, vocab=301, max_seq=64)


def test_all_that_a_block_keeps_is_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the plan says, however many saved tensors share them; the storages themselves are free again."""
    monkeypatch.setattr(offload, "SMALL", 1)
    loads: list[Load] = []
    send = Load._send
    here: list[weakref.ref] = []

    def sent(self: Load, storage: torch.UntypedStorage) -> offload.Crate:
        if self not in loads:
            loads.append(self)
        here.append(weakref.ref(storage))
        return send(self, storage)

    monkeypatch.setattr(Load, "_send", sent)
    model = Decoder(SHAPE)
    offload_blocks(model.blocks)
    logits = model(torch.randint(0, 301, (2, 64)))
    first, second = (sum(crate.away.nbytes for crate in load.crates.values()) for load in loads)
    block = Pass.of(SHAPE, Layout(), 2, 64).block
    assert second == pytest.approx(block, rel=0.002)
    assert first == pytest.approx(block, rel=0.002)
    assert not any(load.here for load in loads)
    logits.sum().backward()
    assert all(crate.left == 0 and crate.back is None for load in loads for crate in load.crates.values())
    del logits
    crates = [weakref.ref(crate) for load in loads for crate in load.crates.values()]
    loads.clear()
    model.blocks["0"].forward = model.blocks["1"].forward = None  # type: ignore[assignment]
    del model
    gc.collect()
    assert not any(crate() for crate in crates)


def test_small_ones_and_weights_stay() -> None:
    model = Decoder(SHAPE)
    load = Load(None, None, [])
    block = model.blocks["0"]
    small, large = torch.ones(8), torch.ones(offload.SMALL)
    weight = block.mlp.up.weight
    assert load.pack(block, small) is small
    assert load.pack(block, weight) is weight
    assert load.pack(block, weight.t()).untyped_storage().data_ptr() == weight.data_ptr()
    view = load.pack(block, large)
    assert isinstance(view, offload.View)
    assert torch.equal(load.unpack(view), large)


def test_no_copies_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "_send", lambda *args: pytest.fail("nothing is kept"))
    model = Decoder(SHAPE)
    offload_blocks(model.blocks)
    with torch.no_grad():
        model(torch.randint(0, 301, (2, 64)))
