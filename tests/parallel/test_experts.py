"""Experts dealt out over processes compute what one process computes, however many tokens each of them gets."""

from __future__ import annotations

import pytest
import torch
from harness import Compared, make, run_forked, warm_compiler
from test_parity import right

from weft.config.layout import Layout
from weft.models.moe import Experts, MoE
from weft.models.shape import Shape
from weft.parallel.experts import deal_experts, held_experts
from weft.parallel.mesh import make_mesh
from weft.train.step import find_gradients
from weft.train.training import build
from weft.verify.trace import step_rows

ALONE = [
    "dp2.ep2", "dp2", "fsdp2", "fsdp2.ep2", "fsdp2.zero1.ep2.mb2", "tp2", "tp2.sp", "tp2.ep2.etp1", "tp2.sp.ep2.etp1",
    "tp2.etp1", "dp4.ep4.mb1",
]  # fmt: skip
COMBINED = [
    "dp4.ep2", "fsdp4.ep2.mb2", "dp2.fsdp2.ep2.mb2", "dp2.fsdp2.ep4.mb1", "dp4.ep2.etp2.mb1", "fsdp2.tp2.ep2.mb2",
    "fsdp2.tp2.sp.ep4.etp1", "fsdp4.ep2.etp2.mb2", "pp2.dp2.ep2.mb1", "pp2.fsdp2.tp2.sp.ep2.mb1",
    "fsdp2.tp2.ep2.etp1.full.mb2", "cp2.ep2", "cp2.fsdp2.ep4.mb2",
    "cp2.tp2.sp.ep2.etp1", "fsdp2.ep2.selective.mb2", "pp2.tp2.ep2.etp1.full.mb2",
]  # fmt: skip


@pytest.mark.parametrize("layout", ALONE + COMBINED)
def test_experts_equal_one_process(layout: str, compared: Compared) -> None:
    right(compared(make("mixtral", layout)))


@pytest.mark.parametrize("layout", ["fsdp2.ep2.mb2", "dp2.ep2", "fsdp4.ep2.mb1"])
def test_low_precision(layout: str, compared: Compared) -> None:
    """Not under tp: other sums in bf16 send a few tokens elsewhere, and a router that saw them learns something else."""
    right(compared(make("mixtral", f"{layout}.bf16")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("model", "layout"),
    [("mixtral", "compile.mb4"), ("deepseek", "tp2.sp.ep2.etp1.compile"), ("mixtral", "fsdp2.pp2.zbh1.mb2.compile")],
)
def test_compiled_around_the_experts(model: str, layout: str, compared: Compared) -> None:
    right(compared(make(model, layout)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_two_parts_of_a_block_are_compiled() -> None:
    """Torch would leave out what it cannot compile, and say nothing."""
    warm_compiler()

    def work(rank: int) -> None:
        config = make("mixtral", "mb4.compile")
        training = build(config, torch.device("cpu"))
        find_gradients(training.woven, training.scaler, step_rows(training, None, 1))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2

    run_forked(1, work)
    with pytest.raises(ValueError, match="would silently not be compiled at all"):
        make("mixtral", "compile.full")


SHAPE = Shape(
    family="mixtral", num_layers=1, hidden=8, num_heads=2, ffn=12, vocab=32, max_seq=16,
    experts={"num_experts": 4, "per_token": 2},
)  # fmt: skip


@pytest.mark.parametrize("layout", ["dp4.ep4", "dp2.ep2", "dp4.ep2.etp2", "tp2.ep2.etp1"])
@pytest.mark.parametrize("chosen", [[0, 1], [3, 2], [1, 3]])
def test_an_expert_or_a_process_without_tokens(layout: str, chosen: list[int]) -> None:
    """Every token has the same experts: the others, and whole processes, have nothing to do, and gradients of zero."""
    cut = Layout.parse(layout)

    def work(rank: int) -> None:
        mesh = make_mesh(cut, torch.device("cpu"))
        torch.manual_seed(0)
        whole = Experts(SHAPE)
        tokens = torch.randn(cut.world, 6, SHAPE.hidden)
        numbers, weights = torch.tensor(chosen).expand(6, 2), torch.rand(cut.world, 6, 2)
        model = MoE(SHAPE)
        deal_experts(model, SHAPE, cut, mesh)
        experts, ffn = held_experts(SHAPE, cut, mesh)
        rows = torch.tensor([expert * 12 + row for expert in experts for row in ffn])
        with torch.no_grad():
            for name, parameter in model.experts.named_parameters():
                parameter.copy_(whole.get_parameter(name)[rows])
        mine = model.experts(tokens[rank], numbers, weights[rank])
        mine.square().sum().backward()
        wanted = [whole(x, numbers, w) for x, w in zip(tokens, weights, strict=True)]
        torch.testing.assert_close(mine, wanted[rank])
        sum(y.square().sum() for y in wanted).backward()
        for name, parameter in model.experts.named_parameters():
            expected = whole.get_parameter(name).grad
            assert expected is not None
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[rows])

    run_forked(cut.world, work)
