"""The benchmarks are run by hand and seldom: what they take from weft must still be there when they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_that_a_benchmark_imports_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)


ROW = {
    "id": "a", "set": "a", "source": "a page", "framework": "Megatron-Bridge 25.11", "gpu": "B200", "gpus": 64,
    "gpus_per_node": 8, "model": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256},
    "tp": 1, "pp": 1, "cp": 1, "fsdp": "Megatron-FSDP", "micro_batch": 1, "global_batch_sequences": 128,
    "precision": "bf16", "measured": {"step_s": 5.0},
}  # fmt: skip


def test_a_row_says_how_many_blocks_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    some = published.read_run(ROW | {"recipe": {"cpu_offloading_num_layers": 5}})
    assert some.work.cut.offload == 5 / 80
    untold = published.read_run(ROW | {"extras": ["activation offloading"]})
    assert untold.work.cut.offload == 0.5


def test_a_row_of_a_machine_whose_products_were_measured_has_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    theirs, others = (
        published.read_run(ROW | {"source": source}) for source in ("github MooreThreads/SimuMax", "a page")
    )
    assert theirs.cluster.gemm_efficiency < 0.9 * others.cluster.gemm_efficiency


def test_a_row_in_8_bits_says_whether_its_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    core = ROW | {"framework": "Megatron-Core 2025", "precision": "fp8", "fsdp": None, "zero_stage": 1}
    beside, themselves = (published.read_run(core | {"extras": extras}) for extras in ([], ["fp8 parameters"]))
    assert (beside.software.copies8, themselves.software.copies8) == (2, 0)


def test_transformer_engines_cross_entropy_keeps_logits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4,096 tokens and 50,257 words Gipfelsturm's team saw 1.58 GB less with it: 7.7 bytes a logit."""
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    core = ROW | {"framework": "Megatron-Core 2025"}
    plain, lean = (published.read_run(core | {"extras": extras}) for extras in ([], ["cross entropy of TE"]))
    assert plain.software.logits - lean.software.logits == 6
    assert published.read_run(ROW).software.logits == lean.software.logits


def test_megatron_bridges_plain_recipes_add_gradients_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    tables, plain = (published.read_run(ROW | {"extras": extras}) for extras in ([], ["gradients in 32 bits"]))
    assert (tables.software.gradients, plain.software.gradients, plain.software.reduced) == (2, 4, 4)


def test_megatron_cores_cpu_takes_a_while_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    core = ROW | {"framework": "Megatron-Core 2025"}
    xeon, grace, jax = (
        published.read_run(row).software.least
        for row in (core, core | {"gpu": "GH200", "gpus_per_node": 4}, ROW | {"framework": "MaxText"})
    )
    assert xeon == 4.3e-3
    assert grace == pytest.approx(5.2e-3, rel=0.01)
    assert jax == 0


def test_a_row_says_whose_softmax_its_scores_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    scaling = ROW | {"framework": "AA-Scaling", "gpu": "A100-80GB", "fsdp": None, "zero_stage": 1}
    fused, torch = (published.read_run(scaling | {"kernel": kind}).software.softmax for kind in ("fused", "torch"))
    assert (fused, torch) == (2048, 0)


def test_a_precision_aware_optimizer_keeps_what_weights_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with 2.1 billion parameters held 4 GiB less than was predicted."""
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    core = ROW | {"framework": "Megatron-Core 2025"}
    plain, aware = (published.read_run(core | {"extras": one}) for one in ([], ["precision-aware optimizer"]))
    assert (plain.software.master, aware.software.master) == (4, 2)


def test_weights_in_16_bits_have_all_else_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    torch = ROW | {"framework": "torchtitan", "extras": ["weights in 16 bits"]}
    fsdp, ddp = (
        published.read_run(torch | {"fsdp": kind, "zero_stage": zero}) for kind, zero in (("FSDP", 3), (None, 0))
    )
    for one, gradients, reduced in ((fsdp, 2, 4), (ddp, 4, 2)):
        soft = one.software
        assert (soft.weights, soft.gradients, soft.moments, soft.reduced) == (2, gradients, 4, reduced)


def test_torchtitans_tp_costs_a_cpu_more_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    torch = ROW | {"framework": "torchtitan", "fsdp": "FSDP", "zero_stage": 3, "tp": 8}
    eager, compiled = (published.read_run(torch | {"extras": one}) for one in ([], ["torch.compile"]))
    assert eager.software.tp_host > 0.01
    assert compiled.software.tp_host == 0


def test_megatron_llama_hides_its_gradients_where_its_optimizer_is_overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    llama = ROW | {"framework": "Megatron-LLaMA", "gpu": "A100-80GB", "fsdp": None, "zero_stage": 1}
    plain, beside = (published.read_run(llama | {"extras": one}).software for one in ([], ["overlapped optimizer"]))
    assert (plain.overlap_dp, plain.reduced, plain.fused, plain.dropout) == (0, 4, 0, 0)
    assert (beside.overlap_dp, beside.bucket) == (1, 4e8)


MIXTURE = {"experts": 128, "topk": 8, "moe_ffn": 1536}


@pytest.mark.parametrize("ep", [8, 16])
def test_routing_as_it_comes_gives_one_process_more(ep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    fullest = importlib.import_module("weft.plan.time.imbalance").fullest
    row = ROW | {"model": ROW["model"] | MIXTURE, "fsdp": None, "zero_stage": 1, "ep": ep}
    even, as_it_comes = (
        published.read_run(row | {"extras": extras}).work
        for extras in (["forced balanced routing"], ["routing as it comes"])
    )
    assert fullest(even) == 1
    assert fullest(as_it_comes) == pytest.approx(published.UNEVEN)


def test_a_fused_grouped_mlp_moves_less_of_tokens_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron-Bridge's recipes have it since 26.06, and MLPerf 6.0's before (NVTE_CUTEDSL_FUSED_GROUPED_MLP)."""
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    row = ROW | {"model": ROW["model"] | MIXTURE, "fsdp": None, "zero_stage": 1, "ep": 8}
    fused = published.read_run(row | {"extras": ["fused grouped MLP"]}).software
    later = published.read_run(row | {"source": '"26.06 NeMo Container"'}).software
    assert (fused.routing, fused.graphs) == (later.routing, later.graphs) == (0.2, 2)


def test_a_graph_of_the_whole_iteration_has_buffers_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    published = importlib.import_module("published")
    row = ROW | {"model": ROW["model"] | MIXTURE, "fsdp": None, "zero_stage": 1, "ep": 8}
    kinds = ("full_iteration", "transformer_engine")
    whole, parts = (published.read_run(row | {"recipe": {"cuda_graph_impl": kind}}).software.stash for kind in kinds)
    assert (whole, parts) == (1.2, 1)


def test_a_row_that_is_none_is_left_out_and_the_others_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    planner = importlib.import_module("planner")
    untold = {key: value for key, value in ROW.items() if key != "global_batch_sequences"}
    rows = [ROW, ROW | {"pp": "many"}, ROW | {"measured": 5}, untold | {"fsdp": None, "dp": 64, "grad_accum": 2}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs, left_out = planner.read(file)
    assert [run.job.global_batch for run in runs] == [128, 128]  # of the last: 1 in each of 2 turns of 64 replicas
    assert sum(left_out.values()) == 2
    assert all(reason.startswith("not in this form: ") for reason in left_out)
