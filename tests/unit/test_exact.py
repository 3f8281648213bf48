"""One process of a layout on imagined tensors, against the planner's formulas and against counts by hand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.load import make_config
from weft.exact.curve import Curve
from weft.exact.imagine import imagined
from weft.exact.rank import Exact, imagine_rank, unnumbered
from weft.models.shape import Shape
from weft.plan.memory.stage import stages

MODEL = {
    "family": "llama", "num_layers": 4, "hidden": 256, "num_heads": 8, "num_kv_heads": 4, "ffn": 704, "vocab": 8000,
    "max_seq": 256,
}  # fmt: skip
GPT = {"family": "gpt2", "num_layers": 4, "hidden": 256, "num_heads": 8, "vocab": 8001, "max_seq": 256}
MIXTURE = {**MODEL, "family": "mixtral", "ffn": 352, "experts": {"num_experts": 8, "per_token": 2}}
BATCH, SEQ, LAYERS, HIDDEN = 8, 256, 4, 256
TOKENS = BATCH * SEQ
SHAPE = Shape.model_validate(MODEL)


@lru_cache
def exact(layout: str, name: str = "llama", rank: int = 0, device: str = "cuda", **over: object) -> Exact:
    model = {"llama": MODEL, "gpt2": GPT, "mixtral": MIXTURE}[name]
    sizes = {"global_batch": BATCH, "seq": SEQ}
    return imagine_rank(make_config({"model": model, "layout": layout, "train": sizes, **over}), rank, device)  # type: ignore[arg-type]


def sent(found: Exact, kind: str) -> tuple[int, int]:
    """Messages of one kind along all axes, and their bytes; without the two, of 24 and 16 bytes, in which all agree."""
    lines = [it for it in found.messages if it.kind == kind]
    agreed, size = (2, 24 + 16) if kind == "all-reduce" else (0, 0)
    return sum(it.count for it in lines) - agreed, sum(it.bytes for it in lines) - size


# layout, family, rank: (planned peak) / (exact peak) - 1 is at most
NEAR = {
    ("single", "llama", 0): 0.002,
    ("single", "gpt2", 0): 0.002,
    ("full", "llama", 0): 0.002,
    ("selective", "llama", 0): 0.002,
    ("redo-mlp.chunked", "llama", 0): 0.002,
    ("full.offload", "llama", 0): 0.002,
    ("offloadoptimizer", "llama", 0): 0.002,
    ("dp2.mb2.offloadoptimizer.bf16", "gpt2", 0): 0.002,
    ("bf16", "gpt2", 0): 0.002,
    ("bf16", "llama", 0): 0.002,
    ("bf16.mb2", "llama", 0): 0.002,
    ("bf16.mb2", "mixtral", 0): 0.002,
    ("tp2.mb2.bf16", "llama", 0): 0.002,
    ("pp2.mb2.bf16", "llama", 0): 0.01,
    ("dp2.mb1.bf16", "llama", 1): 0.002,
    ("dp2.ep2.mb1.bf16", "mixtral", 0): 0.002,
    ("dp2", "llama", 1): 0.002,
    ("dp2.fsdp2.mb1.bf16", "llama", 0): 0.002,
    ("fsdp4.zero1.mb1.bf16", "llama", 0): 0.002,
    ("fsdp4.zero2.mb1.bf16grads.bf16", "llama", 0): 0.002,
    ("tp2.sp", "llama", 1): 0.002,
    ("tp4.fsdp2.bf16", "gpt2", 0): 0.01,
    ("cp2.ring", "llama", 0): 0.005,
    ("pp2.mb2", "llama", 0): 0.02,
    ("pp2.mb2.gpipe", "llama", 0): 0.02,
    ("pp2.mb2.gpipe", "llama", 1): 0.02,
    ("fsdp2.pp2.mb1.bf16", "llama", 2): 0.01,
    ("pp2.zbv.mb1", "llama", 0): 0.02,
    ("single", "mixtral", 0): 0.002,
    ("dp2.ep2", "mixtral", 0): 0.002,
    ("dp4.ep2", "mixtral", 0): 0.002,
    ("fsdp2.zero1.mb1.bf16", "llama", 0): 0.01,
    ("fsdp2.pp2.zero1.mb1.bf16", "llama", 0): 0.01,
    ("fsdp2.pp2.mb1.bf16", "mixtral", 0): 0.01,
    ("fsdp2.ep2.mb2.bf16", "mixtral", 0): 0.005,
    ("fsdp2.zero2.mb1.full.bf16", "mixtral", 0): 0.01,
    ("fsdp2.pp2.vp2.interleaved.mb1.bf16", "llama", 0): 0.03,
    ("fsdp2.pp2.vp2.interleaved.mb1.full.bf16", "llama", 2): 0.02,
    ("fsdp2.zero1.pp2.vp2.interleaved.mb2.bf16", "llama", 0): 0.1,
    ("pp2.zbh1.mb1", "llama", 0): 0.01,
    ("pp4.zbh1.mb1", "llama", 0): 0.01,
    ("pp2.zbh1.mb1.bf16", "llama", 0): 0.01,
    ("pp2.zbv.mb1.bf16", "llama", 1): 0.02,
    ("fsdp2.pp2.zbh1.zero2.mb1.bf16", "llama", 0): 0.01,
    ("pp2.zbh1.mb1.full.bf16", "gpt2", 0): 0.02,
    ("pp4.zbh1.mb1.full.bf16", "gpt2", 1): 0.02,
    ("pp4.zbh1.mb1.bf16", "gpt2", 1): 0.02,
    ("pp2.zbv.mb1.full.bf16", "llama", 1): 0.01,
    ("fsdp2.zero1.pp2.zbv.mb1.bf16", "llama", 2): 0.03,
}


@pytest.mark.parametrize(("layout", "name", "rank"), NEAR)
def test_the_plan_is_near(layout: str, name: str, rank: int) -> None:
    found = exact(layout, name, rank)
    at_peak, plan = found.at_peak(), found.plan
    assert at_peak["weights"] == plan.weights
    assert at_peak["optimizer"] == pytest.approx(plan.optimizer, rel=1e-4, abs=64)  # steps are counted, and scales kept
    assert found.parameters == found.planned.stage.shard
    assert plan.tensors / found.ledger.peak - 1 == pytest.approx(0, abs=NEAR[layout, name, rank])
    update = next(phase for phase in found.ledger.phases if phase.name == "update")
    gradients = sum(it.size for it in found.ledger.alive(update.start) if found.ledger.kind(it) == "gradients")
    assert gradients == next(it for it in found.planned.moments if it.moment == "update").gradients


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", ["tp2.bf16", "tp2.sp.bf16", "tp4.sp.bf16", "tp2.sp.pp2.mb2.bf16"])
def test_what_is_computed_again_saves_memory(layout: str, name: str) -> None:
    """Also under sp, where what came over the network is larger than what any process has of its own."""
    none, selective = exact(layout, name), exact(f"{layout}.selective", name)
    assert selective.ledger.peak < 0.97 * none.ledger.peak
    assert selective.plan.tensors / selective.ledger.peak - 1 == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["bf16", "bf16.mb1"])
def test_of_few_tokens_the_plan_is_near_too(layout: str, tied: bool) -> None:
    train = {"global_batch": 2, "seq": 16}
    found = imagine_rank(make_config({"model": {**MODEL, "tied": tied}, "layout": layout, "train": train}), 0, "cuda")
    assert found.plan.tensors / found.ledger.peak - 1 == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("layout", ["offloadweights.bf16", "fsdp2.bf16", "fsdp2.zero2.bf16"])
def test_at_the_end_nothing_is_gathered_any_more(layout: str) -> None:
    """Of a large table the last reduction is the fullest moment, and FSDP2 has given the table back."""
    train = {"global_batch": 2, "seq": 16}
    found = imagine_rank(make_config({"model": {**MODEL, "vocab": 32000}, "layout": layout, "train": train}), 0, "cpu")
    assert found.plan.moment == "end of the backward pass"
    assert found.plan.tensors / found.ledger.peak - 1 == pytest.approx(0, abs=0.002)


def test_on_a_gpu_the_loss_takes_no_copy() -> None:
    """Of some rows on a CPU: where no logits are whole, that is when a process is fullest."""
    gpu, cpu = exact("chunked"), exact("chunked", device="cpu")
    assert cpu.plan.tensors / cpu.ledger.peak - 1 == pytest.approx(0, abs=0.002)
    assert gpu.plan.tensors / gpu.ledger.peak - 1 == pytest.approx(0, abs=0.002)
    copy, numbers = 2**19 // 8000 * 8000, 3 * 1024
    assert cpu.ledger.peak - gpu.ledger.peak == pytest.approx(4 * (copy - numbers), rel=0.01)


# -- messages by hand -------------------------------------------------------------------------------------------------


def test_messages_of_tp() -> None:
    """Two sums in a block each way; one of the embedding, one of the head's input; of the loss two."""
    count, size = sent(exact("tp2"), "all-reduce")
    assert count == (2 * LAYERS + 1) * 2 + 2
    assert size == (2 * LAYERS + 1) * 2 * 4 * TOKENS * HIDDEN + 3 * 4 * TOKENS


def test_messages_of_sp() -> None:
    """Each sum is a scattering here and a gathering there, of the whole sequence."""
    found = exact("tp2.sp", rank=1)
    each_way = 2 * LAYERS + 1  # entrances of the blocks' parts and of the head; as many exits, of the embedding too
    for kind in ("all-gather", "reduce-scatter"):
        assert sent(found, kind) == (2 * each_way, 2 * each_way * 4 * TOKENS * HIDDEN)


def test_messages_of_fsdp() -> None:
    """ZeRO-3: blocks are gathered twice, what is outside of them once; all is reduced once."""
    found = exact("fsdp2")
    stage = found.planned.stage
    assert sent(found, "all-gather") == (2 * LAYERS + 1, 4 * (2 * sum(stage.blocks) + stage.root))
    assert sent(found, "reduce-scatter") == (LAYERS + 1, 4 * stage.params)


def test_messages_of_dp_and_pp() -> None:
    assert sent(exact("dp2", rank=1), "all-reduce")[1] == 4 * SHAPE.num_params
    found = exact("pp2.mb2")
    for kind in ("send", "receive"):
        assert sent(found, kind) == (BATCH // 2, 4 * TOKENS * HIDDEN)


def test_messages_of_experts() -> None:
    """In each block and each way: rows, what they are weighed with, and rows back; before that, how many there are."""
    count, size = sent(exact("dp2.ep2", "mixtral"), "all-to-all")
    rows = 2 * TOKENS // 2
    assert count == LAYERS * (1 + 3 * 2)
    assert size == LAYERS * (8 * 8 + 2 * 4 * rows * (2 * HIDDEN + 1))


def test_axes_have_their_names() -> None:
    """Of a group of all processes the name is that of the axis that it is."""
    lines = exact("tp4.fsdp2.bf16", "gpt2").messages
    assert {(it.kind, it.axis, it.size) for it in lines} >= {("all-gather", "shard", 2), ("all-reduce", "tp", 4)}
    assert all(it.wire <= 2 * it.bytes for it in lines)


# -- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "ways"), [("single", 1), ("tp2", 2), ("cp2.ring", 2), ("dp2", 2)])
def test_flops_are_shapes(layout: str, ways: int) -> None:
    flops = exact(layout, rank=0).flops
    assert flops["matmul"] + flops["attention_causal"] == pytest.approx(
        SHAPE.flops_per_token(SEQ, causal=True) * TOKENS / ways, rel=1e-9
    )
    assert "again" not in flops


def test_flops_of_recomputation() -> None:
    """The forward pass of each block again, but for its last matrix: nothing in backward needs what that gives."""
    flops = exact("full").flops
    head = 2 * HIDDEN * SHAPE.vocab * TOKENS
    forward = SHAPE.flops_per_token(SEQ, causal=True) * TOKENS / 3 - head
    assert flops["again"] == pytest.approx(forward - LAYERS * 2 * HIDDEN * SHAPE.ffn * TOKENS, rel=1e-9)


def test_experts_that_are_computed_again_are_no_work_of_the_model() -> None:
    """All three products once more, for each token's two experts: a CPU's keep what they take when they are done."""
    plain, again = exact("single", "mixtral").flops, exact("redo-experts", "mixtral").flops
    assert again["matmul"] == plain["matmul"]
    product = 2 * HIDDEN * 352 * 2 * TOKENS
    assert again["again"] == pytest.approx(LAYERS * 3 * product, rel=1e-9)


# -- what is not computed ---------------------------------------------------------------------------------------------


def test_any_rank_of_many() -> None:
    """A model of 70 billion parameters among 1,024 processes: its share, in next to no memory."""
    tree = {"model": "llama3-70b", "layout": "fsdp32.tp8.sp.pp4.full.bf16", "train": {"global_batch": 128, "seq": 4096}}
    config = make_config({**tree, "model": {"preset": "llama3-70b", "num_layers": 4}})
    found = imagine_rank(config, 1023)
    shares = [stage.shard for stage in stages(config.model, config.layout)]
    assert found.stage == 3
    assert found.parameters <= shares[3]
    assert found.parameters == pytest.approx(shares[3], rel=0.01)
    assert not dist.is_initialized()


def test_a_process_is_left_as_it_was() -> None:
    with pytest.raises(KeyError), imagined(0, 2):
        raise KeyError
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("layout", "rank", "over", "words"),
    [
        ("dp2", 2, {}, "layout dp2 has ranks 0 to 1, and no 2"),
        ("dp2", 0, {"optimizer": {"kind": "muon"}}, "Muon's processes tell each other what they hold"),
        ("fsdp2.offloadweights", 0, {}, "layout.offload_weights divides it: leave offload_weights out"),
    ],
)
def test_refused(layout: str, rank: int, over: dict, words: str) -> None:
    config = make_config({"model": MODEL, "layout": layout, "train": {"global_batch": BATCH, "seq": SEQ}, **over})
    with pytest.raises(ValueError, match=words):
        imagine_rank(config, rank)


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_curve_reaches_the_peak_and_comes_back() -> None:
    found = exact("single")
    curve = Curve.of(found.ledger)
    assert curve.bytes.sum(axis=0).max() == found.ledger.peak
    assert [name for name, _, _ in curve.phases if name in ("forward", "backward", "update")] == [
        "forward", "backward", "update",
    ]  # fmt: skip
    assert curve.bytes[:3, -1].tolist() == [4 * SHAPE.num_params, found.at_peak()["optimizer"], 4 * SHAPE.num_params]
    assert sum(found.by_module().values()) == found.ledger.peak
    assert unnumbered("blocks.3.mlp.up") == "blocks.mlp.up"


CONFIG = """layout = "tp2"
[model]
family = "llama"
num_layers = 2
hidden = 64
num_heads = 4
ffn = 160
vocab = 256
max_seq = 64
[train]
device = "cpu"
"""


def test_command(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    svg, html = tmp_path / "memory.svg", tmp_path / "memory.html"
    words = ["plan", "exact", str(tmp_path / "run.toml"), "--rank", "1", "--svg", str(svg), "--html", str(html)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for said in ("rank 1 of 2", "memory, as on a CPU", "all-reduce", "matrix products of the model", f"written: {svg}"):
        assert said in done.output
    areas = [it for it in ElementTree.parse(svg).iter() if it.tag.endswith("polygon")]
    assert len(areas) >= 5
    assert "Whose it is" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "exact", "gpt2-124m", "--rank", "0", "--stage", "0"], "both name a process: leave one out"),
        (["plan", "exact", "gpt2-124m", "--stage", "1"], "--stage 1: layout single has stages 0 to 0"),
        (["plan", "exact", "gpt2-124m", "--device", "tpu"], "--device tpu is not known: cuda or cpu"),
        (["plan", "layouts", "gpt2-124m", "--cluster", "h100x8", "--batch", "8", "--exact"], "name it with --layout"),
        (["train", "--model", "gpt2-124m", "--exact"], "--exact is a part of --dry-run: add that"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert said in str(done.exception)
