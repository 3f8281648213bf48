"""Shares, moments and micro-batches in flight of the planned memory."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.tree import Config, OptimizerConfig
from weft.models import head
from weft.models.cuts import cut_dim
from weft.models.parameters import parameter_sizes
from weft.models.shape import Experts, Latent, Shape
from weft.parallel import loss, mesh, shard
from weft.plan.machine import read_cluster
from weft.plan.memory import activations, logits
from weft.plan.memory import moments as memory
from weft.plan.memory.activations import Pass
from weft.plan.memory.footprint import footprint
from weft.plan.memory.moments import BASE, NAMES, TENSORS, fitted, largest, layout_memory
from weft.plan.memory.passes import in_flight
from weft.plan.memory.stage import held, stages
from weft.plan.numbers import Job, numbers
from weft.plan.plan import Plan
from weft.plan.show import words
from weft.train import muon

GPT2 = Shape(family="gpt2", num_layers=12, hidden=768, num_heads=12, vocab=50257, max_seq=1024)
LLAMA = Shape(num_layers=6, hidden=256, num_heads=8, num_kv_heads=4, ffn=704, vocab=32000, max_seq=512)
MIXTURE = Shape(
    num_layers=6, hidden=256, num_heads=8, num_kv_heads=4, ffn=704, vocab=32000, max_seq=512,
    experts=Experts(num_experts=8, per_token=2, ffn=300, dense_layers=1),
)  # fmt: skip
DEEPSEEK = Shape(
    family="deepseek_v3", num_layers=6, hidden=256, num_heads=8, ffn=704, vocab=32000, max_seq=512,
    latent=Latent(q_rank=96, kv_rank=64, nope_dim=24, rope_dim=8, value_dim=20),
    experts=Experts(num_experts=8, per_token=2, ffn=300, dense_layers=1, shared=2, scores="sigmoid"),
)  # fmt: skip


def config(model: str = "gpt2-124m", layout: str = "single", batch: int = 8, **over: object) -> Config:
    return make_config({"model": model, "layout": layout, "train": {"global_batch": batch, "seq": 256}, **over})


@pytest.mark.parametrize("shape", [GPT2, LLAMA, MIXTURE, DEEPSEEK], ids=["gpt2", "llama", "mixture", "deepseek"])
def test_one_process_holds_every_parameter(shape: Shape) -> None:
    [stage] = stages(shape, Layout())
    assert stage.params == stage.shard == shape.num_params == sum(map(math.prod, parameter_sizes(shape).values()))


@pytest.mark.parametrize("shape", [GPT2, LLAMA, MIXTURE, DEEPSEEK], ids=["gpt2", "llama", "mixture", "deepseek"])
def test_stages_hold_the_model_and_a_tied_head_twice(shape: Shape) -> None:
    found = stages(shape, Layout(pp=4))
    twice = shape.vocab * shape.hidden if shape.tied else 0
    assert sum(stage.params for stage in found) == shape.num_params + twice
    assert [stage.num_blocks for stage in found] == [len(part) for part in Layout(pp=4).stage_blocks(shape)]


def test_the_first_process_holds_the_largest_share() -> None:
    sizes = {"embed.weight": (50257, 768), "norm.weight": (768,)}
    assert held(sizes, tp=2) == 25129 * 768 + 768  # of an odd vocabulary the larger half
    assert held(sizes, tp=1, fsdp=5) == 10052 * 768 + 154


@pytest.mark.parametrize(
    ("layout", "most"),
    [
        ("pp4", [4, 3, 2, 1]),
        ("pp4.gpipe", [8] * 4),
        ("pp4.vp3.interleaved", [15, 13, 11, 9]),
        ("pp4.vp3.bfs", [24] * 4),
    ],
)
def test_micro_batches_in_flight_are_those_of_the_schedule(layout: str, most: list[int]) -> None:
    run = config(layout=layout)
    one = Pass.of(run.model, run.layout, 1, 256)
    table = run.layout.table(8)
    for stage, expected in zip(stages(run.model, run.layout), most, strict=True):
        assert sum(in_flight(table, stage, one, 0).forward.values()) == expected


def test_a_process_of_a_v_holds_both_ends() -> None:
    first, second = stages(GPT2, Layout.parse("pp2.zbv"))
    assert first.first
    assert first.last
    assert second.stages.keys() == {1, 2}
    assert first.params + second.params == GPT2.num_params + GPT2.vocab * GPT2.hidden


def test_what_the_plan_says_twice_is_the_same_elsewhere() -> None:
    assert (logits.LOSS_ROWS, logits.LOSS_CPU_LOGITS) == (loss.ROWS, loss.CPU_LOGITS)
    assert (logits.HEAD_ROWS, logits.HEAD_COLUMNS) == (loss.HEAD_ROWS, loss.HEAD_COLUMNS)
    assert logits.VECTOR == head.VECTOR
    assert memory.MUON_AT_ONCE == muon.AT_ONCE
    assert activations.HEAD_ALIGNED == head.ALIGNED
    assert words.ORDER == mesh.AXES
    assert {name: dtype.itemsize for name, dtype in shard.DTYPES.items()} == activations.ITEM


def test_the_terms_add_up() -> None:
    for device in ("cpu", "cuda"):
        [memory] = layout_memory(config(layout="bf16", checkpoint={"every": 10}), device)
        for moment in memory.moments:
            assert moment.total == sum(getattr(moment, name) for name in NAMES)
            assert moment.tensors == sum(getattr(moment, name) for name in TENSORS)
            assert moment.total <= memory.peak.total or device == "cuda"


def peak(layout: str, **over: object) -> int:
    return max(stage.peak.tensors for stage in layout_memory(config(layout=layout, **over), "cuda"))


def test_cutting_takes_memory_away() -> None:
    assert peak("fsdp2") < peak("fsdp2.zero2") <= peak("fsdp2.zero1") <= peak("dp2")
    assert peak("tp2.sp") < peak("tp2") < peak("single")
    assert peak("pp2") < peak("pp2.gpipe") < peak("single") + 1
    assert peak("full") < peak("selective") < peak("single")
    assert peak("mb1") < peak("mb2") < peak("single")
    assert peak("chunked", batch=64) < peak("single", batch=64) - activations.ITEM["fp32"] * 48 * 256 * GPT2.vocab


def test_recompute_by_degrees() -> None:
    order = ["full", "full/2", "full/3", "single"]
    assert sorted(map(peak, order)) == list(map(peak, order))
    assert peak("full") == peak("full:12")
    assert peak("full:4") < peak("full:3")
    assert peak("full") <= peak("keep-attention") < peak("selective") < peak("single")
    assert peak("redo-attention+mlp") < peak("redo-mlp") < peak("redo-attention") < peak("single")


def test_a_share_of_blocks_may_go_to_the_cpu() -> None:
    """The first of them, which are gone when the last are there (Transformer Engine's `cpu_offloading_num_layers`)."""
    made = make_config({"model": {"preset": "llama3-8b"}, "layout": "fsdp8.mb1.offload.bf16"})
    work = numbers(made.model, made.layout, Job(seq=8192, global_batch=8), read_cluster("h100x8"))

    def kept(share: float) -> float:
        return float(footprint(replace(work, cut=replace(work.cut, offload=share))).activations)

    assert kept(1) < kept(0.5) == pytest.approx(kept(0) / 2)
    assert kept(5 / 32) == pytest.approx(kept(0) * 27 / 32)
    assert kept(0.97) == kept(1)  # one block and less: those on their way count


@pytest.mark.parametrize(
    ("layout", "batch"),
    [
        ("fsdp8.bf16", 8), ("fsdp8.mb1.bf16", 32), ("fsdp8.full.mb1.bf16", 64), ("fsdp8.zero1.mb1.bf16", 16),
        ("fsdp8.selective.bf16", 8), ("fsdp8.chunked.bf16", 8), ("fsdp8.full.bf16", 8), ("tp8.bf16", 1),
        ("dp2.tp4.sp.bf16", 2), ("dp2.tp4.sp.mb1.bf16", 8), ("fsdp4.cp2.bf16", 4), ("cp2.tp4.sp.bf16", 1),
        ("pp8.mb1.bf16", 32), ("pp2.fsdp4.mb1.bf16", 32), ("pp8.zbh1.mb1.bf16", 32),
    ],
)  # fmt: skip
def test_a_search_counts_about_what_a_dry_run_counts(layout: str, batch: int) -> None:
    """In closed form: gradients of a step's only micro-batch come as activations go, others are there beside them."""
    train = {"global_batch": batch, "seq": 8192}
    made = make_config({"model": {"preset": "llama3-8b"}, "layout": layout, "train": train})
    counted = max(memory.peak.tensors for memory in layout_memory(made, "cuda"))
    work = numbers(made.model, made.layout, Job(seq=8192, global_batch=batch), read_cluster("h100x8"))
    assert float(footprint(work).allocated) == pytest.approx(counted, rel=0.03)


def two_ways(model: str, layout: str, batch: int, seq: int) -> tuple[float, int]:
    """Bytes of the fullest process in closed form, and counted moment by moment."""
    made = make_config({"model": model, "layout": layout, "train": {"global_batch": batch, "seq": seq}})
    cluster = read_cluster("h100", made.layout.world)
    plan = Plan.of(made.model, made.layout, Job(seq=seq, global_batch=batch), cluster)
    return float(plan.memory.allocated), largest(layout_memory(made, "cuda")).peak.tensors


@pytest.mark.parametrize(
    ("model", "layout", "batch", "seq"),
    [
        # chunks of 4 and 3 blocks: recomputed in two of each; the fuller ones are those that begin the second round
        ("gpt3-1.3b", "dp2.fsdp4.tp2.pp4.vp2.interleaved.mb32.full/2.bf16", 4096, 2048),
        ("qwen3-8b", "fsdp16.zero2.cp2.ulysses.tp4.sp.pp2.vp3.interleaved.mb4.redo-mlp.bf16", 1024, 32768),
        ("llama3.2-1b", "fsdp2.zero1.tp2.pp2.vp4.interleaved.mb16.selective.chunked.bf16", 256, 8192),
        ("llama3.2-1b", "fsdp16.pp4.vp4.interleaved.mb16.full.bf16", 4096, 2048),  # the last process is the fullest
        # one block in a stage, a sequence that tp and sp cut, two micro-batches
        ("gpt3-6.7b", "fsdp8.pp32.mb1.full.fp16", 1000, 2048),
        ("llama2-7b", "cp2.tp16.sp.pp4.mb4.full.bf16", 256, 32768),
        ("qwen3-0.6b", "fsdp4.cp2.tp4.sp.pp2.mb1.selective.bf16", 8, 4096),
        # norms of queries and keys
        ("qwen3-0.6b", "mb1.bf16", 1, 32768),
        ("qwen3-0.6b", "fsdp2.zero1.mb4.bf16", 8, 2048),
        # in fp32 FSDP2 has whole weights beside its shares
        ("qwen3-0.6b", "fsdp2.zero2.mb1.full", 8, 2048),
        ("llama3.2-1b", "fsdp2.zero2.pp2.mb1.redo-mlp", 16, 2048),
        # weights on the CPU
        ("deepseek-v3", "fsdp32.ep16.etp1.tp8.sp.mb2.full.offloadweights.fp16", 1024, 32768),
        ("mixtral-8x22b", "fsdp4.pp6.mb1.full.offloadweights.bf16", 256, 32768),
        ("qwen3-235b-a22b", "dp16.fsdp2.etp1.tp4.sp.pp2.vp12.interleaved.mb4.full.offloadweights.bf16", 4096, 8192),
        ("mistral-7b", "mb4.full.offloadweights.bf16", 1000, 32768),
        # gradients that are put off: late processes, with and without one block more
        ("qwen3-0.6b", "fsdp8.zero2.tp8.pp8.zbh1.mb1.full.bf16", 1000, 1024),
        ("qwen3-32b", "tp8.pp9.zbv.mb4.full.bf16", 1024, 1024),
        ("qwen3-8b", "fsdp2.zero1.pp8.zbh1.mb8.offload.bf16", 1024, 2048),
        # all micro-batches go forward first
        ("mixtral-8x7b", "fsdp2.ep4.etp1.tp4.sp.pp16.vp2.bfs.mb2.full/2.bf16", 96, 2048),
    ],
)  # fmt: skip
def test_a_search_counts_so_where_it_was_far_off(model: str, layout: str, batch: int, seq: int) -> None:
    """By 7 to 48 % each, for a reason of its own, before the closed form had a place for it."""
    closed, counted = two_ways(model, layout, batch, seq)
    assert closed == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("layout", ["fsdp4.tp2.sp.mb16.bf16", "fsdp8.mb8.bf16", "tp2.mb4", "fsdp2.pp2.mb2.bf16"])
def test_selective_recomputation_keeps_less_than_none(layout: str) -> None:
    none, some = (two_ways("gpt2-124m", one, 128, 1024) for one in (layout, f"{layout}.selective"))
    assert some[0] < none[0]
    assert some[1] < none[1]


def test_recompute_within_a_budget() -> None:
    def chosen(layout: str) -> list[str]:
        made = config(layout=layout)
        return [fitted(made, stage, "cuda").layout.recompute for stage in stages(made.model, made.layout)]

    most, least = peak("single") + BASE["cuda"], peak("full") + BASE["cuda"]
    assert chosen(f"fit{most // 2**20 + 1}m") == ["none"]
    [some] = chosen(f"fit{(most + least) // 2**21}m")
    assert some not in ("none", "full:12")
    assert peak(some) + BASE["cuda"] <= (most + least) // 2
    fewer = f"full:{int(some.removeprefix('full:')) - 1}"
    assert peak(fewer) + BASE["cuda"] > (most + least) // 2**21 * 2**20
    first, *others = chosen("pp4.stages4-3-3-2.fit1720m")  # the first stage has the most micro-batches in flight
    assert first != "none"
    assert others == ["none"] * 3
    with pytest.raises(ValueError, match=r"fit9m: with every block of stage 0 recomputed a process still takes .* GiB"):
        layout_memory(config(layout="fit9m"))


def test_fixed_terms_of_adamw_in_fp32() -> None:
    [memory] = layout_memory(config())
    assert memory.peak.weights == 4 * GPT2.num_params
    assert memory.peak.optimizer == 8 * GPT2.num_params
    update = next(moment for moment in memory.moments if moment.moment == "update")
    assert update.gradients == 4 * GPT2.num_params


def test_muon_keeps_one_moment_of_each_matrix() -> None:
    [memory] = layout_memory(config(optimizer={"kind": "muon"}))
    matrices = 12 * GPT2.block_matmul_params(0)
    assert memory.peak.optimizer == 8 * GPT2.num_params - 4 * matrices
    assert memory.peak.optimizer == 4 * sum(
        len(OptimizerConfig(kind="muon").moments(name, dims)) * math.prod(dims)
        for name, dims in parameter_sizes(GPT2).items()
    )


@pytest.mark.parametrize("zero", [1, 3])
def test_gradients_in_bf16_take_half_until_they_are_reduced(zero: int) -> None:
    """Of a step of several micro-batches: what waits, whole, for its reduction, and what is there during one."""
    layouts = (f"fsdp4.zero{zero}.mb1.bf16", f"fsdp4.zero{zero}.mb1.bf16.bf16grads")
    wide, narrow = (layout_memory(config(layout=layout))[0].moments for layout in layouts)
    [stage] = stages(GPT2, Layout.parse(layouts[0]))
    # of ZeRO-3, what lies outside of the blocks waits unreduced for the next pass, in the reduction's own buffer
    waiting = 2 * (stage.params if zero == 1 else stage.root)
    assert wide[0].gradients - narrow[0].gradients == waiting
    block = max(index for index, moment in enumerate(wide) if "first block" in moment.moment)  # of the last pass
    assert wide[block].temporary - narrow[block].temporary == 2 * stage.block - 2 * stage.block_shard


@pytest.mark.parametrize("layout", ["single", "fsdp2.tp2"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_8bit_moments(kind: str, layout: str) -> None:
    """Against the moments themselves, in their blocks, as one process makes them."""
    made = config(layout=layout, optimizer={"kind": kind, "states": "8bit"})
    [memory] = layout_memory(made)
    cut, expected = made.layout, 0
    for name, dims in parameter_sizes(GPT2).items():
        share = list(dims)
        if (dim := cut_dim(name)) is not None:
            share[dim] = -(-share[dim] // cut.tp)
        numbers = -(-share[0] // cut.fsdp) * math.prod(share[1:])
        if made.optimizer.in_8bit(name, dims):
            expected += 2 * -(-numbers // 256) * (256 + 4)
        else:
            expected += 4 * len(made.optimizer.moments(name, dims)) * numbers
    assert memory.peak.optimizer == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_offloaded_moments_are_not_on_the_gpu(kind: str) -> None:
    matrices = 12 * GPT2.block_matmul_params(0) if kind == "muon" else 0
    made = config(layout="offloadoptimizer", optimizer={"kind": kind})
    [gpu], [cpu] = (layout_memory(made, device) for device in ("cuda", "cpu"))
    assert gpu.peak.optimizer == 4 * matrices
    assert cpu.peak.optimizer == 4 * matrices + 16 * (GPT2.num_params - matrices)


def test_offloaded_weights_leave_a_gpu_what_blocks_are_gathered_from() -> None:
    """Of weights, moments and reduced gradients nothing stays; the share of one block is on its way up."""
    (plain,), (away,) = (
        layout_memory(config(layout=f"fsdp4.bf16{end}"), "cuda") for end in ("", ".offloadweights")
    )  # fmt: skip
    for before, after in zip(plain.moments, away.moments, strict=True):
        assert after.weights == after.optimizer == 0
        rises = (
            4 * plain.stage.block_shard if after.moment.startswith("backward of the") and "block" in after.moment else 0
        )
        assert after.copies == before.copies + rises
    assert away.moments[-1].gradients == 0
    (same,), (cpu,) = (layout_memory(config(layout=f"fsdp4.bf16{end}"), "cpu") for end in ("", ".offloadweights"))
    assert same.peak == cpu.peak


def test_staging_stays_between_checkpoints_and_is_not_on_a_gpu() -> None:
    [memory] = layout_memory(config(checkpoint={"every": 10}))
    assert memory.peak.staging == 12 * GPT2.num_params
    [without] = layout_memory(config(checkpoint={"every": 10, "asynchronous": False}))
    assert without.peak.total == memory.peak.total - memory.peak.staging
    [gpu], [seldom] = (layout_memory(config(checkpoint={"every": every}), "cuda") for every in (10, 0))
    assert gpu.peak.tensors == seldom.peak.tensors


def test_offloaded_activations_do_not_add_up_on_a_gpu() -> None:
    """Two blocks' worth is there, however many there are; with all of it recomputed, two inputs."""
    plain, away, inputs = (
        layout_memory(config(layout=layout), "cuda")[0].moments for layout in ("single", "offload", "full.offload")
    )
    block = Pass.of(GPT2, Layout(), 8, 256)
    first = next(index for index, moment in enumerate(plain) if moment.moment == "backward of the last block")
    assert plain[first].activations - away[first].activations == 12 * block.block
    assert away[first].temporary - plain[first].temporary == 2 * block.block
    assert inputs[first].activations == away[first].activations
    assert inputs[first].temporary - plain[first].temporary == 2 * block.hidden + block.block - block.hidden


def test_moments_are_named_so_that_a_sentence_can_end_with_them() -> None:
    """Fullest at the …"""
    moments = [moment.moment for stage in layout_memory(config(layout="pp2.zbv.mb1")) for moment in stage.moments]
    assert not [name for name in moments if re.match("(the|their|its|a) ", name)]
