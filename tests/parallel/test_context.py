"""Context parallelism: every way to cut the sequence computes what one process computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Compared, make, run_forked
from test_parity import right
from torch import Tensor

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.models.attention import attend, attention_mask
from weft.models.decoder import Decoder
from weft.models.rope import rope_table
from weft.models.shape import Shape
from weft.parallel import context, flash, woven
from weft.parallel.headtail import by_process, chunks_of, in_sequence, own_tokens
from weft.plan.memory.activations import Pass
from weft.train.step import eval_step
from weft.train.training import build
from weft.verify.trace import step_rows

KINDS = ["allgather", "ring", "ulysses"]
COMBINED = [
    "dp2.cp2.{}", "fsdp2.cp2.{}.mb2", "fsdp2.zero1.cp2.{}.mb2", "fsdp2.zero2.cp2.{}.mb2", "cp2.{}.tp2", "cp2.{}.tp2.sp",
    "cp2.{}.pp2.mb2", "cp2.{}.selective", "cp2.{}.full.mb4", "fsdp2.cp2.{}.tp2.sp.selective.mb2",
    "cp2.{}.tp2.sp.pp2.full.mb2", "fsdp2.cp2.{}.pp2.mb1", "dp2.cp2.{}.pp2.selective.mb2",
]  # fmt: skip


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_alone(model: str, kind: str, ways: int, compared: Compared) -> None:
    right(compared(make(model, f"cp{ways}.{kind}")))


@pytest.mark.parametrize("layout", COMBINED)
@pytest.mark.parametrize("kind", KINDS)
def test_combined(layout: str, kind: str, compared: Compared) -> None:
    right(compared(make("llama", layout.format(kind))))


@pytest.mark.parametrize("layout", ["cp2.ring.chunked", "fsdp2.cp2.tp2.sp.chunked.mb2"])
def test_chunked_loss(layout: str, compared: Compared) -> None:
    right(compared(make("llama", layout)))


@pytest.mark.parametrize("layout", ["fsdp2.cp2.mb2", "dp2.cp2.ring.mb2"])
def test_muon(layout: str, compared: Compared) -> None:
    right(compared(make("llama", layout, optimizer={"kind": "muon"})))


@pytest.mark.parametrize("layout", ["cp2.ring", "fsdp2.cp2.ulysses.pp2", "cp4.tp2.sp"])
def test_evaluation(layout: str, tmp_path: Path) -> None:
    for name in ("single", layout):
        config = make("llama", name)
        run_forked(config.layout.world, lambda rank, config=config: _evaluate(config, rank, tmp_path))
    (one, targets), (cut, counted) = (torch.load(tmp_path / name) for name in ("single", layout))
    assert cut == pytest.approx(one, rel=1e-6)
    assert counted == targets


def _evaluate(config: Config, rank: int, folder: Path) -> None:
    training = build(config, torch.device("cpu"))
    found = eval_step(training.woven, step_rows(training, None, 1))
    if rank == 0:
        torch.save(found, folder / str(config.layout))


@pytest.mark.parametrize("kind", KINDS)
def test_eight(kind: str, compared: Compared) -> None:
    """Chunks of one token; 16 of them. As many heads as processes."""
    right(compared(make("gpt2", f"cp8.{kind}", model={"num_heads": 8})))


@pytest.mark.parametrize("window", [2, 5, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_sliding_window(kind: str, window: int, compared: Compared) -> None:
    right(compared(make("qwen3", f"cp2.{kind}", model={"sliding_window": window})))


@pytest.mark.parametrize("layout", ["cp4.{}", "cp2.{}.tp2.sp.mb2", "fsdp2.cp2.{}.pp2.selective.mb1"])
@pytest.mark.parametrize("kind", KINDS)
def test_sliding_window_combined(kind: str, layout: str, compared: Compared) -> None:
    kv_heads = {"num_heads": 8, "num_kv_heads": 4}
    right(compared(make("qwen3", layout.format(kind), model=kv_heads)))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "cp2.{}"),
        ("llama", "cp4.{}.mb4"),
        ("gpt2", "fsdp2.cp2.{}.tp2.sp.mb2"),
        ("llama", "cp2.{}.pp2.selective.mb2"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_document_masks(
    model: str,
    kind: str,
    layout: str,
    documents: Path,
    compared: Compared,
) -> None:
    """Documents end in chunks of other processes, and a chunk may see nothing of another."""
    data = {"paths": [str(documents)], "document_mask": True, "split": (1, 0, 0)}
    right(compared(make(model, layout.format(kind), data=data)))


@pytest.mark.parametrize("layout", ["cp2.{}.bf16", "cp4.{}.mb2.fp16", "cp2.{}.tp2.sp.selective.mb2.bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind: str, layout: str, compared: Compared) -> None:
    right(compared(make("llama", layout.format(kind))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "layout",
    [
        "cp2.allgather.full.compile",
        "cp2.ring.compile",
        "fsdp2.cp2.ring.tp2.sp.selective.compile",
        "fsdp2.cp2.ulysses.tp2.sp.selective.compile",
    ],
)
def test_compiled_blocks(layout: str, compared: Compared) -> None:
    right(compared(make("llama", layout)))


# -- what would go wrong in silence -----------------------------------------------------------------------------------


def test_parts_added_without_their_weights(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """The log-sum-exp says how much each part of the keys weighs; without it each would weigh the same."""

    def average(a: Any, b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return b if a is None else ((a[0] + b[0]) / 2, torch.logaddexp(a[1], b[1]))

    monkeypatch.setattr(context, "merge", average)
    assert compared(make("llama", "cp2.ring")).first_wrong() == "blocks.0.attention (forward)"


def test_positions_counted_from_each_process(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    compared(make("llama", "single"))
    whole = woven.Rows.part

    def part(self: woven.Rows, ways: int, index: int) -> woven.Rows:
        rows = whole(self, ways, index)
        counted = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
        return woven.Rows(rows.tokens, rows.targets, counted, rows.documents)

    monkeypatch.setattr(woven.Rows, "part", part)
    assert compared(make("llama", "cp2")).first_wrong() == "blocks.0.attention (forward)"


def test_gradients_dealt_out_in_another_order(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    """Keys come together in the order of the sequence; their gradients have to go back to whose they are."""

    def contiguous(x: Tensor, ways: int) -> Tensor:
        return x.unflatten(-2, (ways, x.shape[-2] // ways)).movedim(-3, 0)

    monkeypatch.setattr(context, "by_process", contiguous)
    report = compared(make("llama", "cp2"))
    assert report.worst("output")[0].right
    assert report.first_wrong() == "blocks.3.attention.v.weight (gradient)"


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2, 3, 8])
def test_order_and_back(ways: int) -> None:
    x = torch.arange(2 * ways * 5 * 3).view(1, -1, 3)
    parts = torch.stack(
        [x[:, [*early, *late]] for early, late in (chunks_of(x.shape[1], ways, i) for i in range(ways))]
    )
    assert torch.equal(by_process(x, ways), parts)
    assert torch.equal(in_sequence(parts), x)
    assert all(torch.equal(own_tokens(x[..., 0], ways, i), parts[i, ..., 0]) for i in range(ways))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 2, 4, 9, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_merged_tiles_are_plain_attention(window: int | None, masked: bool, dtype: torch.dtype) -> None:
    """Forward and backward, tile by tile, against one call of `attend`."""
    seq, size, device, rounding = 24, 6, torch.device("cpu"), 1e-6 if dtype == torch.float32 else 1e-2
    stream = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, h, seq, 8, generator=stream).to(dtype).requires_grad_() for h in (4, 2, 2, 4))
    documents = torch.randint(0, 2, (2, seq), generator=stream).cumsum(dim=1) // 3 if masked else None
    expected = attend(q, k, v, attention_mask(seq, window, documents, device))
    expected.backward(grad)

    sight, scale, runs = flash.Sight(window, documents), 8**-0.5, [range(i, i + size) for i in range(0, seq, size)]
    sums = [torch.zeros(x.shape) for x in (q, k, v)]
    with torch.no_grad():
        for mine in runs:
            seen = [(keys, sight.tile(mine, keys, device)) for keys in reversed(runs)]
            total = None
            for keys, tile in seen:
                if tile is not None:
                    total = flash.merge(total, tile.attend(*_cut(mine, q), *_cut(keys, k, v), scale))
            assert total is not None
            assert apart(total[0], *_cut(mine, expected)) < rounding
            for keys, tile in seen:
                if tile is not None:
                    found = tile.backward(*_cut(mine, grad, q), *_cut(keys, k, v), total[0].to(dtype), total[1], scale)
                    for sum_, run, part in zip(sums, (mine, keys, keys), found, strict=True):
                        sum_[:, :, run.start : run.stop] += part
    for x, found in zip((q, k, v), sums, strict=True):
        assert x.grad is not None
        assert apart(found, x.grad) < rounding


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def _cut(tokens: range, *tensors: Tensor) -> list[Tensor]:
    return [x[:, :, tokens.start : tokens.stop] for x in tensors]


def test_tiles_that_nobody_sees_are_left_out() -> None:
    """Causal order leaves each process of four the same work: two tiles of every four, and three of its own."""
    sight, device = flash.Sight(None, None), torch.device("cpu")
    for mine in range(4):
        for other in range(4):
            pairs = [(a, b) for a in chunks_of(64, 4, mine) for b in chunks_of(64, 4, other)]
            seen = [sight.tile(a, b, device) for a, b in pairs]
            assert sum(tile is not None for tile in seen) == (3 if mine == other else 2)
            assert all(tile.mask is None for tile in seen if tile is not None)


def test_who_sees_nothing_weighs_nothing() -> None:
    """torch's kernel gives a query without keys the log-sum-exp 0, as if it saw something."""
    q, k, v = (torch.randn(1, 1, 2, 8) for _ in range(3))
    _, lse = flash.Tile(mask=torch.tensor([[[[True, False], [False, False]]]])).attend(q, k, v, 1.0)
    assert lse[0, 0, 1] == -math.inf
    assert lse[0, 0, 0].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_values_narrower_than_keys(kind: str) -> None:
    """As latent attention has them."""
    run_forked(2, lambda rank: _narrow(kind, rank))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 16])
def test_block_keeps_what_the_plan_says(kind: str, window: int | None) -> None:
    run_forked(2, lambda rank: _kept(kind, window))


def _kept(kind: str, window: int | None) -> None:
    shape = Shape(
        num_layers=1, hidden=64, num_heads=4, num_kv_heads=2, ffn=160, vocab=301, max_seq=64, sliding_window=window
    )
    group = torch.distributed.group.WORLD
    assert group is not None
    model = Decoder(shape)
    context.cut_sequence(model, group, kind, window)
    x, rope = torch.randn(2, 32, 64, requires_grad=True), rope_table(shape, torch.arange(32))
    mask = model.attention_mask(32, window, None, x.device)
    known = {y.untyped_storage().data_ptr() for y in (*model.parameters(), *rope)}
    kept: dict[int, Tensor] = {}  # held, for a freed storage's address may be used again

    def pack(y: Tensor) -> Tensor:
        kept.setdefault(y.untyped_storage().data_ptr(), y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        model.blocks["0"](x, rope, mask)
    size = sum(y.untyped_storage().nbytes() for place, y in kept.items() if place not in known)
    layout = Layout.model_validate({"cp": 2, "cp_kind": kind})
    assert size == pytest.approx(Pass.of(shape, layout, 2, 64).block, rel=0.002)


def _narrow(kind: str, rank: int) -> None:
    stream = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, 8, e, generator=stream).requires_grad_() for e in (12, 12, 8, 8))
    expected = attend(q, k, v, None)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    group = torch.distributed.group.WORLD
    assert group is not None
    places = torch.tensor([token for chunk in chunks_of(8, 2, rank) for token in chunk])
    mine = [x[:, :, places].detach().requires_grad_() for x in (q, k, v)]
    attending = context.attending(group, kind, None)
    found = attending(*mine, None)
    grads = torch.autograd.grad(found, mine, grad[:, :, places])
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        assert apart(a, b[:, :, places]) < 1e-6
