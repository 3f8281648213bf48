"""The activation count of the plan against autograd itself: what a block and the head really keep."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from weft.config.layout import Layout
from weft.config.recompute import Recompute
from weft.models.attention import attention_mask
from weft.models.decoder import Block, Decoder
from weft.models.rope import rope_table
from weft.models.shape import Experts, Latent, Shape
from weft.parallel.loss import cross_entropy_sum, linear_cross_entropy_sum
from weft.parallel.recompute import recompute_blocks
from weft.parallel.weave import compile_blocks
from weft.plan.memory.activations import Pass
from weft.plan.memory.logits import loss_workspace

SHAPES = {
    "gpt2": Shape(family="gpt2", num_layers=2, hidden=64, num_heads=4, vocab=301, max_seq=64),
    "llama": Shape(num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, ffn=160, vocab=301, max_seq=64),
    "qwen3": Shape(
        family="qwen3", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=32, ffn=160, vocab=301,
        max_seq=64,
    ),
    "mistral": Shape(
        family="mistral", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, ffn=160, vocab=301, max_seq=64,
        sliding_window=16,
    ),
    "mixtral": Shape(
        family="mixtral", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, ffn=160, vocab=301, max_seq=64,
        experts=Experts(num_experts=8, per_token=2, ffn=48),
    ),
    "deepseek": Shape(
        family="deepseek_v3", num_layers=2, hidden=64, num_heads=4, ffn=160, vocab=301, max_seq=64,
        latent=Latent(q_rank=24, kv_rank=40, nope_dim=24, rope_dim=8, value_dim=16),
        experts=Experts(num_experts=8, per_token=2, ffn=48, shared=1, scores="sigmoid", groups=4, top_groups=2),
    ),
    "latent": Shape(
        num_layers=2, hidden=64, num_heads=4, ffn=160, vocab=301, max_seq=64,
        latent=Latent(kv_rank=40, nope_dim=16, rope_dim=8, value_dim=24),
    ),
}  # fmt: skip
BATCH, SEQ = 2, 64


def kept_bytes(run: Callable[[], Tensor], weights: nn.Module, *given: Tensor) -> int:
    """Bytes of the different storages that autograd keeps of a forward pass; weights and `given` not counted."""
    known = {x.untyped_storage().data_ptr() for x in (*weights.parameters(), *given)}
    sizes: dict[int, int] = {}
    alive = []

    def pack(x: Tensor) -> Tensor:
        alive.append(x)  # a freed storage's address may be used again
        if x.untyped_storage().data_ptr() not in known:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SHAPES)
def test_block_keeps_what_the_plan_says(family: str, precision: str) -> None:
    assert_kept(family, Layout(precision=precision), rel=0.002)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("family", SHAPES)
def test_compiled_block_keeps_what_the_plan_says(family: str) -> None:
    """How a norm's statistics and small views are kept is the compiler's affair."""
    assert_kept(family, Layout(precision="bf16", compile=True), rel=0.01)


def assert_kept(family: str, layout: Layout, rel: float) -> None:
    shape = SHAPES[family]
    block = Block(shape, 0).to(torch.float32 if layout.precision == "fp32" else torch.bfloat16)
    if layout.compile:
        compile_blocks(nn.ModuleDict({"0": block}))
    x = torch.randn(BATCH, SEQ, shape.hidden, dtype=block.attention.q.weight.dtype, requires_grad=True)
    rope = rope_table(shape, torch.arange(SEQ)) if shape.positions == "rotary" else ()
    mask = attention_mask(SEQ, shape.sliding_window, None, x.device)
    kept = kept_bytes(lambda: block(x, rope or None, mask), block, *rope)
    planned = Pass.of(shape, layout, BATCH, SEQ).block
    assert kept == pytest.approx(planned, rel=rel)


BLOCKS = [
    (family, form)
    for family in ("gpt2", "llama", "qwen3")
    for form in ("full", "full/2", "full:1", "redo-mlp", "redo-attention+mlp", "redo-attention/3")
]
MIXED = [(family, form) for family in ("mixtral", "deepseek") for form in ("redo-experts", "redo-attention+experts/2")]


@pytest.mark.parametrize(("family", "form"), BLOCKS + MIXED)
def test_recomputed_blocks_keep_what_the_plan_says(family: str, form: str) -> None:
    shape, count = SHAPES[family].model_copy(update={"num_layers": 4}), 4
    model = Decoder(shape)
    recompute_blocks(model.blocks, Recompute.parse(form))
    x = torch.randn(BATCH, SEQ, shape.hidden, requires_grad=True)
    rope = rope_table(shape, torch.arange(SEQ)) if shape.positions == "rotary" else None

    def run() -> Tensor:
        y = x
        for block in model.blocks.values():
            y = block(y, rope)
        return y

    planned = Pass.of(shape, Layout(recompute=form), BATCH, SEQ).blocks(count)
    assert kept_bytes(run, model, *(rope or ())) == pytest.approx(planned, rel=0.002)


@pytest.mark.parametrize("family", ["gpt2", "llama", "latent"])
@pytest.mark.parametrize("keeps", ["matmul", "attention", "matmul+attention"])
def test_kept_operations(family: str, keeps: str) -> None:
    """What selective recomputation keeps is no saved tensor of autograd's: memory is counted as it is taken."""
    shape, form = SHAPES[family], f"keep-{keeps}"
    block = Block(shape, 0)
    recompute_blocks(nn.ModuleDict({"0": block}), Recompute.parse(form))
    x = torch.randn(BATCH, SEQ, shape.hidden, requires_grad=True)
    rope = rope_table(shape, torch.arange(SEQ)) if shape.positions == "rotary" else None
    gc.collect()  # what an earlier test left behind must not be given back, and counted, inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        y = block(x, rope)
    taken = sum(event.self_cpu_memory_usage for event in profiled.events()) + x.nbytes - y.nbytes
    planned = Pass.of(shape, Layout(recompute=form), BATCH, SEQ).kept
    assert taken == pytest.approx(planned, rel=0.03)  # and some small states


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_follows_the_last_block(family: str) -> None:
    shape = SHAPES[family]
    model, passed = Decoder(shape), Pass.of(shape, Layout(), BATCH, SEQ)
    x = torch.randn(BATCH, SEQ, shape.hidden, requires_grad=True)
    targets = torch.randint(shape.vocab, (BATCH, SEQ))
    assert model.norm is not None
    assert model.head is not None
    norm, head = model.norm, model.head
    kept = kept_bytes(lambda: cross_entropy_sum(head(norm(x)), targets), model, targets)
    assert kept == pytest.approx(passed.last + passed.logits, rel=0.002)
    kept = kept_bytes(lambda: linear_cross_entropy_sum(norm(x), head.weight, targets), model, targets)
    assert kept == pytest.approx(passed.last + head.weight.nbytes, rel=0.002)


@pytest.mark.parametrize("loss", ["", ".chunked"])
def test_on_a_gpu_the_loss_has_no_copy(loss: str) -> None:
    """Of a long vocabulary the fp32 copy of 1,024 rows is far larger than three numbers a row."""
    shape = SHAPES["llama"].model_copy(update={"vocab": 128_000})
    one = Pass.of(shape, Layout.parse(f"single{loss}.bf16"), 4, 512, False, range(2), "cuda")
    on_cpu, on_gpu = (loss_workspace(one, device, shape.vocab * shape.hidden) for device in ("cpu", "cuda"))
    rows, columns = 2048 if not loss else 1024, one.logits // (2 * 2048)
    assert on_cpu - on_gpu == 4 * (2**19 // columns * columns - 3 * rows)
