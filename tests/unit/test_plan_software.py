"""What training systems do with a layout (`Software`), and what cards do with a model, as far as a plan's numbers go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from weft.config.layout import Layout
from weft.models.shape import Shape
from weft.plan.machine import read_cluster
from weft.plan.memory.footprint import footprint
from weft.plan.memory.held import processes
from weft.plan.memory.kept import block_activations
from weft.plan.numbers import MEGATRON, Job, numbers
from weft.plan.time import collectives
from weft.plan.time.block import Passes, attention_time
from weft.plan.time.constants import CONSTANTS as C
from weft.plan.time.copies import copies
from weft.plan.time.replicas import at_once
from weft.plan.time.step import Beat, step_time
from weft.plan.work import Software, Work
from weft.presets import preset_shape


def work(
    model: str | Shape, layout: str, software: Software = MEGATRON, *, cluster: str = "h100x64", matmul: str = "16 bit"
) -> Work:
    shape = preset_shape(model) if isinstance(model, str) else model
    return numbers(
        shape, Layout.parse(layout), Job(seq=2048, global_batch=64, matmul=matmul), read_cluster(cluster), software
    )


def launched(one: Work) -> float:
    return float(Beat.of(one, Passes.of(one)).launched)


def test_graphs_take_kernels_from_the_cpu_and_experts_last() -> None:
    """Partial CUDA graphs hold attention and routers; how many tokens an expert has is known to the CPU alone."""
    none, partly, whole = (
        launched(work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16", replace(MEGATRON, graphs=kind)))
        for kind in (0, 1, 2)
    )
    assert none > partly > whole == pytest.approx(C.graph * none)
    assert partly > 0.9 * none  # most kernels are the experts'


def test_a_cpu_takes_for_a_block_at_least_what_its_system_does() -> None:
    """However few its kernels are, and again for what is computed again: of Qwen3-8B, cut in 8, 0.6 ms were counted, and
    runs take 4.3. A graph takes it from the CPU, and a mixture's kernels take more as it is."""
    core = replace(MEGATRON, least=4.3e-3)
    assert launched(work("qwen3-8b", "fsdp8.zero1.tp8.mb1.bf16")) < 1e-3
    assert launched(work("qwen3-8b", "fsdp8.zero1.tp8.mb1.bf16", core)) == 4.3e-3
    again = launched(work("qwen3-8b", "fsdp8.zero1.tp8.mb1.full.bf16", core))
    assert again == pytest.approx(4.3e-3 * (2 + C.backward_kernels) / (1 + C.backward_kernels))
    assert launched(work("qwen3-8b", "fsdp8.zero1.tp8.mb1.bf16", replace(core, graphs=1))) < 1e-3
    mixtures = (work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16", one) for one in (MEGATRON, core))
    assert launched(next(mixtures)) == launched(next(mixtures))


def test_experts_buffers_of_fixed_size_hold_more_than_even_shares() -> None:
    plain, stash, most = (
        float(block_activations(work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16", replace(MEGATRON, stash=share))))
        for share in (1, 1.2, 1.4)
    )
    assert plain < stash
    assert most - stash == pytest.approx(stash - plain)
    dense = [float(block_activations(work("qwen3-8b", "mb1.bf16", replace(MEGATRON, stash=one)))) for one in (1, 1.2)]
    assert dense[0] == dense[1]


def test_scores_are_moved_more_where_no_kernel_takes_their_softmax() -> None:
    """So many keys, or heads that are no multiple of four: PyTorch's own operations, three times the bytes."""
    plain = replace(MEGATRON, flash=0)

    def seconds(layout: str, softmax: float) -> float:
        return float(attention_time(work("llama3-8b", layout, replace(plain, softmax=softmax)))[0])

    assert seconds("tp4.mb1.bf16", 2048) == seconds("tp4.mb1.bf16", np.inf)  # eight heads, 2,048 keys
    assert seconds("tp4.mb1.bf16", 1024) > 2 * seconds("tp4.mb1.bf16", np.inf)
    assert seconds("tp16.mb1.bf16", 2048) > 2 * seconds("tp16.mb1.bf16", np.inf)  # two heads
    assert seconds("tp16.mb2.bf16", 2048) == seconds("tp16.mb2.bf16", np.inf)


@pytest.mark.parametrize(("cluster", "slower"), [("h100x8", True), ("mi250x", False), ("mi300x", False)])
def test_flash_attention_2_is_slower_than_a_cards_own_kernels_where_it_has_such(cluster: str, slower: bool) -> None:
    """Hopper's are twice as fast. CDNA's share of its peak is told of what FlashAttention-2 is there, compiled for it."""
    second, own = (
        float(attention_time(work("llama3-8b", "mb1.bf16", replace(MEGATRON, flash=kind), cluster=cluster))[0])
        for kind in (1, 2)
    )
    assert (second > 1.5 * own) is slower
    assert slower or second == own


def test_graphs_that_route_leave_each_experts_kernels() -> None:
    """Sixteen experts on a process: a graph around what finds and sorts their tokens leaves their products outside."""
    none, routes, whole = (
        launched(work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16", replace(MEGATRON, graphs=kind, graphs_route=flag)))
        for kind, flag in ((1, 0), (1, 1), (2, 0))
    )
    saved = (1 - C.graph) * C.expert_kernels / (C.expert_kernels + 16 * C.each_expert)
    assert (none - routes) / (none - whole) == pytest.approx(saved / (1 - C.graph))


def test_a_librarys_rate_of_8_bits_slows_products_alone() -> None:
    early = replace(MEGATRON, products8=0.5)
    for kind, ratio in (("16 bit", 1.0), ("fp8", 2.0)):
        runs = [work("llama3-70b", "fsdp8.zero1.tp8.mb1.bf16", one, matmul=kind) for one in (MEGATRON, early)]
        first, second = (Passes.of(run).dense for run in runs)
        assert float(second.matmul[0]) == pytest.approx(ratio * float(first.matmul[0]), rel=0.05)
        assert float(second.attention[0]) == float(first.attention[0])


def test_messages_beside_the_computation_split_what_is_launched() -> None:
    plain, split = (
        launched(work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16", replace(MEGATRON, overlap_ep=flag)))
        for flag in (0, 1)
    )
    assert plain < split < (1 + C.split_kernels) * plain


def test_a_cpu_that_waits_for_each_kernel_hides_nothing() -> None:
    """CUDA_LAUNCH_BLOCKING: all that is launched is time, however long the kernels are."""
    run = work("llama3-70b", "fsdp8.zero1.tp8.mb1.full.bf16")
    waiting = replace(run, software=replace(run.software, waits=1))
    count = run.micro_batches * run.blocks
    beat = Beat.of(run, Passes.of(run))
    assert step_time(run).launch == 0
    assert step_time(waiting).launch == pytest.approx(float(count * C.blocked * beat.launched))


@pytest.mark.parametrize("item", [2, 4])
def test_heads_off_16_bytes_are_not_the_tensor_cores(item: int) -> None:
    """108 numbers of 2 bytes are no multiple of 16 bytes; of 4 they are. Flash kernels fill them up."""
    gpt = Shape(family="gpt2", num_layers=4, hidden=13824, num_heads=96, vocab=51200, max_seq=2048)
    narrow = gpt.model_copy(update={"num_heads": 128, "num_kv_heads": 128, "head_dim": 108})
    precision = {2: "bf16", 4: "fp32"}[item]
    for flash in (0, 1):
        wide, odd = (
            float(
                attention_time(
                    work(one, f"tp8.mb4.{precision}", replace(MEGATRON, flash=flash), cluster="a100-80gbx8")
                )[0]
            )
            for one in (gpt, narrow)
        )
        assert (odd > 2 * wide) is (flash == 0 and item == 2)


def test_exponents_bound_narrow_heads_on_blackwell() -> None:
    """As many exponents as products where heads have 128 numbers: of 64, products wait for them half of the time. Ampere's
    products are slow enough for those of 64."""
    wide = Shape(family="llama", num_layers=2, hidden=4096, num_heads=32, ffn=11008, vocab=32000, max_seq=2048)
    narrow = wide.model_copy(update={"num_heads": 64, "num_kv_heads": 64, "head_dim": 64})
    ratios = [
        float(
            attention_time(work(narrow, "mb4.bf16", cluster=name))[0]
            / attention_time(work(wide, "mb4.bf16", cluster=name))[0]
        )
        for name in ("h100x8", "b200x8", "a100-80gbx8")
    ]
    assert 1.1 < ratios[0] < 1.5 < ratios[1] < 2.1
    assert ratios[2] == pytest.approx(1, abs=0.01)


def test_flash_attention_of_2022_has_half_the_rate_of_the_second() -> None:
    first, second = (
        attention_time(work("llama2-7b", "mb4.bf16", replace(MEGATRON, flash=flash), cluster="a100-80gbx8"))[0]
        for flash in (0.5, 1)
    )
    assert (first - C.kernel) / (second - C.kernel) == pytest.approx(1 / C.flash1)


def test_without_a_switch_a_group_has_the_links_among_itself() -> None:
    """MI300X: 64 GB/s to each of the other seven, so that a pair has one of seven links, and eight have all."""
    mesh = read_cluster("mi300xx8").machine()
    for size, stride, links in ((2, 1, 1), (4, 1, 3), (8, 1, 7), (2, 4, 1)):
        assert collectives.rate(size, stride, mesh) == pytest.approx(64e9 * links * C.nvlink)
    pair = collectives.send(1, mesh, 1e9) - C.start
    assert pair == pytest.approx(1e9 / (64e9 * C.nvlink))
    assert collectives.all_to_all(8, 1, mesh, 8e9) == pytest.approx(1e9 / (64e9 * C.nvlink), rel=0.01)
    switched = read_cluster("h100x8").machine()
    assert collectives.rate(2, 1, switched) == collectives.rate(8, 1, switched)


def test_weights_that_travel_in_8_bits_take_half_the_bytes() -> None:
    """Under ZeRO-3 where they are gathered, and under ZeRO-1 where they are given back; gradients travel as they did."""
    for layout in ("fsdp64.mb1.bf16", "fsdp64.zero1.mb1.bf16"):
        alone = replace(MEGATRON, overlap_dp=0)
        wide, narrow = (
            step_time(work("llama2-7b", layout, replace(alone, gathers8=kind), matmul="fp8")).dp for kind in (0, 1)
        )
        assert 0.5 * wide < narrow < 0.9 * wide
        plain = (step_time(work("llama2-7b", layout, replace(alone, gathers8=kind))).dp for kind in (0, 1))
        assert len({float(one) for one in plain}) == 1


def test_logits_that_every_process_of_tp_has_whole() -> None:
    cut, whole = (
        footprint(work("llama2-7b", "fsdp16.tp4.mb1.full.bf16", replace(MEGATRON, whole_head=kind))).logits
        for kind in (0, 1)
    )
    assert whole == 4 * cut


def test_where_tables_count_as_blocks_the_first_stage_has_one_less() -> None:
    """Llama 3's 126 blocks in 8 stages: 15 beside the embedding, 16 in each stage that has no table."""

    def others(model: str) -> list[float]:
        one = work(model, "tp8.pp8.mb1.full.bf16")
        return [float(list(processes(one, first=first))[1].blocks) for first in (False, True)]

    assert others("llama3-405b") == [16, 15]
    assert others("llama3-70b") == [10, 10]


def test_kernels_that_deal_tokens_out_reach_more_of_the_network() -> None:
    chip = read_cluster("h100x64").machine()
    plain, made = (float(collectives.all_to_all(64, 1, chip, 8e9, copies)) for copies in (1, 8))
    distinct = 8 * (1 - (7 / 8) ** 8) / 8  # of a token's 8 copies, those to a node that has none yet
    assert made / plain == pytest.approx(distinct * C.network / C.network_dealt, rel=0.01)


def test_tokens_are_not_dealt_out_again() -> None:
    """Selective recomputation does norms and activations again, and no routing."""
    run = work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.selective.bf16")
    passes = Passes.of(run)
    assert passes.mixed is not None
    redo = float(Beat.of(run, passes).redo)
    assert redo == pytest.approx(float(passes.mixed.elementwise[0] - passes.mixed.routing[0]))
    less = replace(run, software=replace(run.software, routing=0.5))
    assert float(Passes.of(less).mixed.routing[0]) == pytest.approx(float(passes.mixed.routing[0]) / 2)  # type: ignore[union-attr]


def test_experts_results_are_not_kept_where_inner_states_are_weighed() -> None:
    run = work("qwen3-30b-a3b", "fsdp8.zero1.ep8.mb1.bf16")
    less = replace(run, software=replace(run.software, weighs=1))
    routed = run.tokens * 8 * run.sizes.hidden * 2  # one number less of each token's eight copies
    assert block_activations(run) - block_activations(less) == pytest.approx(routed)


def test_what_products_took_is_kept_in_8_bits() -> None:
    """Llama: after two norms, and after the activation: a byte of each number less, in fp8 alone."""
    keeps = replace(MEGATRON, keeps8=1)
    for matmul in ("16 bit", "fp8"):
        plain, less = (
            float(block_activations(work("llama3-8b", "mb1.bf16", one, matmul=matmul))) for one in (MEGATRON, keeps)
        )
        saved = 2048 * (2 * 4096 + 14336) if matmul == "fp8" else 0
        assert plain - less == pytest.approx(saved)


def test_latent_attention_that_is_raised_again_keeps_its_result_alone() -> None:
    again = replace(MEGATRON, raises_again=1)
    plain, less = (
        float(block_activations(work("deepseek-v3", "ep8.fsdp8.zero1.mb1.bf16", one))) for one in (MEGATRON, again)
    )
    assert plain - less == pytest.approx(2 * 2048 * 128 * (2 * 192 + 128))  # queries and keys, and values


def test_cards_of_more_watts_keep_more_of_their_peak() -> None:
    """GB300 and GB200 are one chip, of 1,400 and 1,200 W; B300 is a B200 with more memory, but for 4 bits."""
    rates = {name: read_cluster(name).machine() for name in ("b200", "b300", "gb200", "gb300")}
    speed = {name: float(np.asarray(chip.peak8 * chip.gemm8)) for name, chip in rates.items()}
    assert speed["gb300"] / speed["gb200"] == pytest.approx(1.137, rel=0.01)
    assert speed["b300"] / speed["b200"] == pytest.approx(0.993, rel=0.01)
    assert rates["b300"].domain == rates["b200"].domain == 8
    assert rates["b300"].memory > 1.4 * rates["b200"].memory


def test_maxtexts_policies_make_products_again() -> None:
    """Of Llama 2 7B's block, with two first products of 4096 × 11008: those alone, then attention's result, then the
    product after it. The more is made again, the less is kept."""
    runs = [work("llama2-7b", "fsdp8.mb1.selective.bf16", replace(MEGATRON, remakes=kind)) for kind in (0, 1, 2, 3)]
    redone = [float(step_time(run).recompute) for run in runs]
    kept = [float(block_activations(run)) for run in runs]
    assert redone == sorted(redone)
    assert kept == sorted(kept, reverse=True)
    block = Passes.of(runs[0]).dense
    blocks = float(runs[0].micro_batches * runs[0].blocks)
    first = 2 * 4096 * 11008 / (4 * 4096**2 + 3 * 4096 * 11008)
    assert redone[1] - redone[0] == pytest.approx(blocks * first * float(block.matmul[0]))
    assert redone[2] - redone[1] == pytest.approx(blocks * float(block.attention[0]))


def test_cdna_has_exponents_for_narrow_heads() -> None:
    narrow = Shape(
        family="llama", num_layers=2, hidden=4096, num_heads=64, head_dim=64, ffn=11008, vocab=32000, max_seq=2048
    )
    wide = narrow.model_copy(update={"num_heads": 32, "num_kv_heads": 32, "head_dim": 128})
    one, other = (attention_time(work(shape, "mb4.bf16", cluster="mi300xx8"))[0] for shape in (narrow, wide))
    assert one == pytest.approx(float(other), rel=0.01)


def test_weights_in_8_bits_may_lie_beside_those_in_16() -> None:
    """As Transformer Engine has them: as they are, and transposed. Tables are no products."""
    kept, lean = (
        footprint(work("llama2-7b", "fsdp16.zero1.tp4.mb1.bf16", replace(MEGATRON, copies8=each), matmul="fp8"))
        for each in (2, 0)
    )
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 4
    assert float(kept.gathered - lean.gathered) == pytest.approx(2 * blocks, rel=1e-3)
    plain = work("llama2-7b", "fsdp16.zero1.tp4.mb1.bf16", replace(MEGATRON, copies8=2))
    assert footprint(plain).gathered == lean.gathered


def test_a_bucket_of_all_gradients_hides_none() -> None:
    """Megatron's are of 40 million parameters, and of a million for each replica: 8 billion are 8 buckets, or one."""
    layout = "fsdp{}.zero1.mb1.bf16"

    def shown(replicas: int, **bucket: float) -> float:
        one = work("llama3-8b", layout.format(replicas), replace(MEGATRON, **bucket), cluster=f"h100x{replicas}")
        one = replace(one, sizes=replace(one.sizes, batch=replicas))
        return float(step_time(one).dp)

    megatron = {"bucket": 40e6, "bucket_each": 1e6}
    assert shown(16, **megatron) == shown(16, bucket=40e6)
    assert shown(64, **megatron) == shown(64, bucket=64e6) > shown(64, bucket=40e6)
    params = preset_shape("llama3-8b").num_params
    slowed = (
        C.contention * params * 2 * 4 / read_cluster("h100").machine().nvlink
    )  # what messages take from the computation
    assert shown(8192, **megatron) == pytest.approx(shown(8192, overlap_dp=0) + slowed, rel=0.01)
    assert shown(8192, bucket=40e6) < 0.8 * shown(8192, **megatron)


def test_buckets_are_those_of_the_first_stages_first_chunk() -> None:
    """All others have one each, which is whole while the first still computes (distributed_data_parallel.py)."""
    shape = preset_shape("llama3-70b")
    for text, part in (("fsdp8.zero1.pp8.mb1.bf16", 1), ("fsdp8.zero1.pp8.vp5.interleaved.mb1.bf16", 5)):
        one = work(shape, text, replace(MEGATRON, bucket=1e12))
        assert float(at_once(one, copies(one)[0])) == pytest.approx(1 / part)
