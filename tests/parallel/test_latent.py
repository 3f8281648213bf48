"""DeepSeek's blocks under every cut: latent attention, shared experts, experts chosen by group."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Compared, make, run_forked
from test_parity import right

from weft.checkpoint.region import Region
from weft.checkpoint.weights import WeightsFolder, create_weights_folder
from weft.models import cuts
from weft.models.parameters import buffer_sizes, stored_sizes
from weft.parallel import context
from weft.plan.memory.stage import stages
from weft.train.training import build, fill_from, initial_region

KINDS = ["allgather", "ring", "ulysses"]


@pytest.mark.parametrize(
    "layout",
    [
        "tp2", "tp2.sp", "tp4.sp.etp1", "fsdp2.mb2", "dp2.fsdp2.zero2.ep2.mb2", "pp2.zbv.mb2", "pp2.zbh1.tp2.sp.full.mb2",
        "tp2.sp.ep2.etp1.selective", "fsdp2.tp2.ep2.mb2", "fsdp2.ep2.pp2.selective.mb2",
        "fsdp2.ep2.keep-network.mb2", "tp2.ep2.etp1.full", "dp2.ep2.pp2.zbh1.full.mb2", "dp4.ep2.etp2.offload.mb1",
        "fsdp2.tp2.sp.pp2.zbv.mb1", "redo-attention.mb4",
    ],
)  # fmt: skip
def test_cuts_equal_one_process(layout: str, compared: Compared) -> None:
    right(compared(make("deepseek", layout)))


@pytest.mark.parametrize("layout", ["cp2.{}", "cp2.{}.tp2.sp.selective", "fsdp2.cp2.{}.ep2.pp2.mb2"])
@pytest.mark.parametrize("kind", KINDS)
def test_context(kind: str, layout: str, compared: Compared) -> None:
    right(compared(make("deepseek", layout.format(kind))))


@pytest.mark.parametrize("layout", ["fsdp2.mb2", "cp2.ring", "cp2.ulysses.tp2.sp"])
def test_document_masks(layout: str, documents: Path, compared: Compared) -> None:
    right(
        compared(make("deepseek", layout, data={"paths": [str(documents)], "document_mask": True, "split": (1, 0, 0)}))
    )


@pytest.mark.parametrize("layout", ["fsdp2.ep2.mb2", "tp2.sp", "pp2.zbv.mb2"])
def test_low_precision(layout: str, compared: Compared) -> None:
    """Every token has every expert: where it chose, one that nearly tied would in a later step go elsewhere."""
    experts = {"num_experts": 4, "per_token": 4, "ffn": 12, "shared": 1, "scores": "sigmoid", "scaling": 2.5}
    right(compared(make("deepseek", f"{layout}.bf16", model={"experts": experts})))


@pytest.mark.parametrize("layout", ["tp2.sp.ep2.etp1", "fsdp2.ep2.pp2.mb2"])
def test_from_a_folder_with_biases(layout: str, folder: Path, compared: Compared) -> None:
    """A router's bias moves tokens to other experts, on every process alike."""
    right(compared(make("deepseek", layout, train={"init_from": str(folder)})))


@pytest.mark.parametrize("layout", ["tp2.sp", "fsdp2.ep2.mb2", "tp2.ep2.etp1", "dp2.pp2.zbv.mb2"])
def test_what_a_process_holds(layout: str, folder: Path) -> None:
    """As many parameters as the plan says; every bias, whole; and of each bias one process speaks."""
    config = make("deepseek", layout)

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"), fill=False)
        fill_from(training.woven, folder, partial(initial_region, config.model, 0))
        stage = stages(config.model, config.layout)[training.mesh.index("pp")]
        held = sum(weight.data.numel() for weight in training.woven.weights)
        assert held == stage.shard if rank == 0 else held <= stage.shard  # the first of each axis has most
        pieces = [piece for piece in training.woven.pieces() if piece.region.name.endswith("router.bias")]
        with WeightsFolder.open(folder) as weights:
            assert all(torch.equal(piece.data, weights.read(piece.region)) and piece.data.any() for piece in pieces)
        everyone: list[list[str]] = [[]] * config.layout.world
        dist.all_gather_object(everyone, [piece.region.name for piece in pieces if piece.writes])
        assert sorted(name for names in everyone for name in names) == sorted(buffer_sizes(config.model))

    run_forked(config.layout.world, work)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, with biases that are not zero."""
    path, shape = tmp_path_factory.mktemp("deepseek") / "model", make("deepseek", "single").model
    stream = torch.Generator().manual_seed(0)
    with create_weights_folder(path, shape, torch.float32) as written:
        for name, dims in stored_sizes(shape).items():
            gain = 1.0 if "norm" in name else 0.0
            written.write(Region.whole(name, dims), gain + 0.1 * torch.randn(dims, generator=stream))
    return path


# -- what would go wrong in silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["attention.q_down", "attention.kv_down", "attention.kv_norm"])
def test_latents_whose_gradients_are_not_added_up(
    part: str, monkeypatch: pytest.MonkeyPatch, compared: Compared
) -> None:
    """Every process makes them whole, and has the gradient of its own heads alone."""
    monkeypatch.setitem(cuts.DECODER_CUTS, f"blocks.*.{part}", "region_of_no_kind")  # type: ignore[arg-type]
    assert compared(make("deepseek", "tp2")).first_wrong() == f"blocks.3.{part}.weight (gradient)"


def test_attention_in_parts_that_forgets_the_scale(monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    in_parts = context.attend_in_parts

    def unscaled(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: None, _: float, **how: str
    ) -> torch.Tensor:
        return in_parts(q, k, v, documents, 1 / math.sqrt(q.shape[-1]), **how)  # type: ignore[arg-type]

    monkeypatch.setattr(context, "attend_in_parts", unscaled)
    assert compared(make("deepseek", "cp2.ring")).first_wrong() == "blocks.0.attention (forward)"
