"""`weft plan layouts`: the search over all layouts, what it says of one, and answers."""

from __future__ import annotations

import json
import random
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_calibrate import LLAMA, cluster, round_machine
from test_plan_memory import two_ways
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.config.load import make_config
from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape
from weft.plan.advice import Question
from weft.plan.grid import AXES, row_of
from weft.plan.machine import read_cluster
from weft.plan.memory.moments import layout_memory, settled
from weft.plan.numbers import WEFT, Job
from weft.plan.plan import Plan
from weft.plan.search import Search, search
from weft.plan.show.findings import refusal, show_plan, show_search
from weft.plan.show.pareto import Pareto
from weft.plan.show.waterfall import memory_parts, slower, time_parts, why_slower
from weft.presets import preset_shape
from weft.units import count, gibibytes

JOB = Job(seq=4096, global_batch=128, tokens=1e11)
SMALL = Shape.model_validate(LLAMA)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(preset_shape("llama3-8b"), JOB, read_cluster("h100x16"))


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", "layouts", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_columns_predict_what_one_layout_alone_gets(found: Search) -> None:
    """Of the fastest, and of candidates anywhere: a layout's own numbers are those of its row."""
    rows = [*found.order[:40], *found.order[:: max(1, len(found.order) // 40)]]
    compared = 0
    for index in rows:
        try:
            plan = found.plan(found.layout(int(index)))
        except ValueError:
            continue
        assert plan.seconds == pytest.approx(found.seconds[index], rel=1e-6), plan.layout
        assert plan.bytes == pytest.approx(found.bytes[index], rel=1e-6), plan.layout
        compared += 1
    assert compared > 40


def test_the_best_fit_are_in_order_and_are_layouts_that_weft_runs(found: Search) -> None:
    plans = found.best(10)
    assert len(plans) == 10
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    assert plans[0].seconds == pytest.approx(found.seconds[found.sure].min(), rel=0.05)
    for plan in plans:
        assert plan.fits
        assert plan.sure
        assert plan.layout.world == 16
        plan.layout.check(found.shape, JOB.global_batch, JOB.seq)
        assert 0.1 < plan.mfu(causal=True) < plan.mfu(causal=False) < 0.8
        assert plan.days * plan.tokens_per_s * 86400 == pytest.approx(JOB.tokens)


def test_what_may_run_out_of_memory_is_behind_what_surely_fits(found: Search) -> None:
    """By how much predictions are off either way; and what is faster is told beside."""
    limit = 0.92 * found.cluster.memory
    surely = [bool(found.sure[index]) for index in found.order]
    assert surely == sorted(surely, reverse=True)
    assert 0 < sum(surely) < len(surely)
    [winner] = found.best(1)
    tight = found.tight(winner)
    assert tight is not None
    assert tight.seconds < winner.seconds
    assert tight.bytes <= limit < (1 + tight.memory.spread) * tight.bytes
    assert (tight.verdict, winner.verdict) == ("fits tightly", "fits")
    assert why_slower(tight, winner) == "tight memory"
    slow = next(plan for _, plan in found.first(found.fastest[::-1], 500) if plan.verdict == "fits tightly")
    assert slow.seconds > winner.seconds
    assert why_slower(slow, winner).endswith(" ms, tight")
    printed = " ".join(run("llama3-8b", "--cluster", "h100x16", "--batch", "128").split())
    assert f"so tight that it may run out of memory: {tight.layout}" in printed


def test_where_nothing_surely_fits_every_answer_says_so(found: Search) -> None:
    """GPUs that hold a little more than the smallest layout of eight is predicted to take."""
    shape, eight = found.shape, read_cluster("h100x8")
    least = search(shape, JOB, eight.model_copy(update={"memory_gib": 1})).bytes.min()
    small = eight.model_copy(update={"memory_gib": 1.02 * least / 0.92 / 2**30})
    full = search(shape, JOB, small)
    best = full.best(3)
    assert best
    assert not any(plan.sure for plan in best)
    told = Question(shape, JOB, small, WEFT).answers(best[0], 1e6, what_if=True)
    answers = {answer.question: answer.answer for answer in told}
    assert re.fullmatch(r"8 GPUs, [\d.,]+ days, tightly", answers["GPUs for 1e+06 days"])
    assert answers["largest micro-batch of this layout"].endswith(", tightly")
    with (console := Console(width=160)).capture() as printed:
        show_search(full, best, console)
        show_plan(best[0], console)
    text = " ".join(printed.get().split())
    assert ", 0 fit, " in text
    assert re.search(r"Nearest that fits: .*, [\d.:]+( m?s)?, tightly\.", text)
    assert f"({gibibytes(0.92 * small.memory)} can be used)" in text


def test_what_computes_products_again_takes_their_time() -> None:
    """All but attention, or but messages, is nearly all of a block; all but products is little."""
    job, shape = Job(seq=8192, global_batch=64), preset_shape("llama3-8b")
    seconds = {
        form: Plan.of(shape, Layout.parse(f"fsdp8.mb1.{form}.bf16"), job, read_cluster("h100x8")).seconds
        for form in ("full", "keep-attention", "keep-network", "selective", "keep-matmul", "fit30g", "fit40g", "fit70g")
    }
    assert seconds["keep-attention"] == seconds["keep-network"] == seconds["full"] > 1.1 * seconds["selective"]
    assert seconds["full"] >= seconds["fit30g"] > seconds["fit40g"] > seconds["fit70g"]


def test_a_budget_is_what_training_makes_of_it() -> None:
    """As many blocks are computed again, and what is not enough is refused in the same words."""
    shape, job, cluster = preset_shape("llama3-8b"), Job(seq=8192, global_batch=64), read_cluster("h100x8")
    settings = {"model": "llama3-8b", "layout": "fsdp8.mb1.fit40g.bf16", "train": {"global_batch": 64, "seq": 8192}}
    blocks = settled(make_config(settings), "cuda").recompute
    budget, said = (Plan.of(shape, Layout.parse(f"fsdp8.mb1.{form}.bf16"), job, cluster) for form in ("fit40g", blocks))
    assert budget.time == said.time
    assert budget.memory == said.memory
    with pytest.raises(ValueError, match="fit9g: with every block") as counted:
        layout_memory(make_config({**settings, "layout": "fsdp8.mb1.fit9g.bf16"}), "cuda")
    few = ["--layout", "fsdp8.mb1.fit9g.bf16", "--cluster", "h100x8", "--batch", "64", "--seq", "8192"]
    with pytest.raises(ValueError, match=re.escape(str(counted.value))):
        run("llama3-8b", *few)


def test_parts_add_up(found: Search) -> None:
    [plan] = found.best(1)
    assert sum(part.size for part in time_parts(plan)) == pytest.approx(plan.seconds)
    assert sum(part.size for part in memory_parts(plan)) == pytest.approx(plan.bytes)
    assert {part.name for part in time_parts(plan)} <= {field.name for field in fields(plan.time)}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_layout_is_whole_on_a_line_of_its_own_or_of_a_table(found: Search, width: int) -> None:
    """So that it can be copied, whatever the terminal."""
    plans = found.best(10)
    with (console := Console(width=width)).capture() as printed:
        show_search(found, plans, console)
    words = {word for line in printed.get().splitlines() for word in line.split()}
    assert {str(plan.layout) for plan in plans} | {str(plan.layout) for _, plan in found.rivals()} <= words


def test_rivals_differ_where_they_say_and_are_slower(found: Search) -> None:
    [winner] = found.best(1)
    rivals = found.rivals()
    assert {"pp", "recompute"} <= {word.split()[0] for word, _ in rivals}
    for word, plan in rivals:
        assert plan.seconds >= winner.seconds
        if word.startswith("pp "):
            assert plan.layout.pp == int(word.split()[1]) != winner.layout.pp


def test_what_does_not_fit_is_told_with_the_nearest_that_does(found: Search) -> None:
    told = found.nearest()
    assert told is not None
    failing, change, words = told
    assert not failing.fits
    assert failing.seconds < found.best(1)[0].seconds
    assert change is not None
    assert change.fits
    assert len(words) == 1


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("fsdp16.bf16", "micro batch 8 → 1: fsdp16.mb1.bf16,"),
        ("tp8.sp.dp2", "precision fp32 → bf16: "),
        ("pp8.dp2.gpipe.mb1.bf16", "schedule → "),
    ],
)
def test_a_named_layout_that_does_not_fit_is_told_what_to_change(layout: str, told: str) -> None:
    text = run("llama3-8b", "--cluster", "h100x16", "--batch", "128", "--seq", "8192", "--layout", layout)
    assert "does not fit" in text
    assert "Nearest that fits: " in text
    assert told in text


def test_a_candidate_is_its_own_nearest(found: Search) -> None:
    for index in found.order[:: len(found.order) // 40]:
        layouts = found.first([int(index)], 1)
        for place, plan in layouts:
            row = row_of(plan.layout, found.shape, found.job)
            assert row == {axis: int(column[place]) for axis, column in found.columns.items()}, plan.layout
            assert found.closest(row)[1] == []  # type: ignore[index]


def test_a_settled_axis_stays(found: Search) -> None:
    tp4 = search(found.shape, JOB, found.cluster, tp=4)
    assert 0 < len(tp4) < len(found)
    assert set(np.unique(tp4.columns["tp"])) == {4}
    assert tp4.columns.keys() == set(AXES)


def test_answers() -> None:
    question = Question(preset_shape("llama3-8b"), JOB, read_cluster("h100x16"), WEFT)
    best = question.best()
    assert best is not None
    size, _ = question.largest_micro_batch(best)
    assert size >= (best.layout.micro_batch or 1)
    for more in (0, 1):
        layout = best.layout.model_copy(update={"micro_batch": size + more})
        batch = JOB.model_copy(update={"global_batch": 8 * (size + more) * layout.replicas})
        assert Plan.of(question.shape, layout, batch, question.cluster).fits == (more == 0)
    longest = question.longest_sequence()
    assert longest is not None
    assert longest[0] > JOB.seq
    hurried = question.gpus_for(best.days / 3)
    assert hurried is not None
    assert hurried.days <= best.days / 3
    assert hurried.cluster.gpus > 16
    links = dict(question.slower_links())
    for plan in links.values():
        assert plan is not None
        assert plan.seconds >= best.seconds
    assert links["NVLink at a quarter"].seconds >= links["NVLink at half"].seconds  # type: ignore[union-attr]


def test_questions_about_a_named_layout_are_answered_of_it() -> None:
    layout = Layout.parse("fsdp8.mb1.full.bf16")
    question = Question(preset_shape("llama3-8b"), JOB, read_cluster("h100x8"), WEFT, layout)
    plan = Plan.of(question.shape, layout, JOB, question.cluster)
    links = dict(question.slower_links())
    assert {str(other.layout) for other in links.values() if other} == {str(layout)}
    assert links["NVLink at a quarter"].seconds > links["NVLink at half"].seconds > plan.seconds  # type: ignore[union-attr]
    assert links["network at half"].seconds == plan.seconds  # type: ignore[union-attr]
    small = question.smaller_moments()
    assert small is not None
    assert small.seconds == pytest.approx(plan.seconds, rel=0.01)
    assert small.bytes < plan.bytes
    seq, longest = question.longest_sequence() or (0, plan)
    assert longest.fits
    assert not Plan.of(question.shape, layout, Job(seq=2 * seq, global_batch=8), question.cluster).fits
    answers = question.answers(plan, 1e4, what_if=True)
    others = [other for asked, _, other in answers if other and not asked.startswith("GPUs for")]
    assert set(others) == {layout}


def test_a_model_of_learned_positions_is_asked_for_no_sequence_beyond_them() -> None:
    question = Question(preset_shape("gpt2-124m"), Job(seq=512, global_batch=64), read_cluster("h100x8"), WEFT)
    answers = {it.question: it.answer for it in question.answers(question.best(), None, what_if=True)}
    assert answers["longest sequence, as many tokens a step"] == "1,024"


def test_small_moments_are_not_offered_where_the_cpu_has_them() -> None:
    layout = Layout.parse("fsdp8.mb1.full.offloadoptimizer.bf16")
    question = Question(preset_shape("llama3-8b"), JOB, read_cluster("h100x8"), WEFT, layout)
    assert question.smaller_moments() is None  # train refuses the two together


def test_equal_times_have_no_minus(found: Search) -> None:
    best = found.best(1)[0]
    assert slower(best, replace(best, time=replace(best.time, rest=best.time.rest * (1 + 1e-6)))) == "+0.0 %"


def test_a_laptop_is_one() -> None:
    assert read_cluster("laptop-cpu").gpus == 1
    assert read_cluster("h100").gpus == 8


def test_of_a_layout_that_does_not_fit_no_micro_batch_does() -> None:
    short = ["--cluster", "h100x8", "--batch", "64", "--layout", "fsdp8.mb1.bf16", "--what-if"]
    assert re.search("largest micro-batch of this layout +none fits", run("llama3-70b", *short))


def test_nobody_need_say_how_long_the_sequences_of_a_short_model_are() -> None:
    assert "8 sequences of 1,024 tokens" in run("gpt2-124m", "--cluster", "h100x8", "--batch", "8")
    assert "8 sequences of 4,096 tokens" in run("llama3-8b", "--cluster", "h100x8", "--batch", "8")
    done = CliRunner().invoke(app, ["plan", "schedule", "1f1b", "--model", "gpt2-124m"])
    assert done.exit_code == 0, done.output


def test_on_a_measured_cluster_all_that_is_told_is_counted() -> None:
    """Table, rivals, picture: the same seconds of the same layout, and no rival has what the winner has."""
    slow = cluster(round_machine(message_scale=30), memory_gib=4)  # slower messages than the rest of the file says
    found = search(SMALL, Job(seq=64, global_batch=8), slow)
    plans = found.best(100)
    seconds = {plan.layout: plan.seconds for plan in plans}
    assert list(seconds.values()) == sorted(seconds.values())
    rivals = dict(found.rivals())
    assert plans[0].layout not in {plan.layout for plan in rivals.values()}
    other = min(plan.seconds for plan in plans if plan.layout.tp != plans[0].layout.tp)
    [tp] = [plan for axis, plan in rivals.items() if re.fullmatch(r"tp \d", axis)]
    assert tp.seconds == other
    drawn = {point.layout: point.seconds for point in Pareto(found).points()}
    assert drawn.keys() & seconds.keys()
    assert all(drawn[layout] == seconds[layout] for layout in drawn.keys() & seconds.keys())
    near = found.nearest()
    assert near is None or near[0].seconds < plans[0].seconds


def test_on_a_measured_cluster_messages_are_slowed_by_their_curves() -> None:
    measured = cluster(round_machine())
    question = Question(SMALL, Job(seq=64, global_batch=8), measured, WEFT)
    best, links = question.best(), dict(question.slower_links())
    assert best is not None
    assert list(links) == ["messages at half", "messages at a quarter"]
    assert best.seconds < links["messages at half"].seconds < links["messages at a quarter"].seconds  # type: ignore[union-attr]
    assert question.smaller_moments() is None


@pytest.mark.parametrize(
    ("text", "number"), [("15T", 15e12), ("15e12", 15e12), ("300b", 3e11), ("1.5M", 1.5e6), ("7", 7.0), ("2k", 2e3)]
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "T", "x15", "-3", "0", "nan", "inf", "15 TT"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of something: write 15e12, 15T or 300B"):
        count(text)


def test_where_nothing_fits_the_number_of_gpus_that_does_is_told() -> None:
    text = run("llama3-405b", "--cluster", "a100-40gbx8", "--batch", "64")
    assert "no layout fits" in text
    assert "Smallest that does not fit" in text
    told = re.search(r"GPUs on which it fits +([\d,]+) GPUs, .*? (\S+)\n", text)
    assert told is not None
    gpus = int(told[1].replace(",", ""))
    question = Question(preset_shape("llama3-405b"), Job(seq=4096, global_batch=64), read_cluster("a100-40gb"), WEFT)
    assert question.best(cluster=read_cluster("a100-40gb", gpus)) is not None
    assert question.best(cluster=read_cluster("a100-40gb", gpus // 2)) is None
    named = run("llama3-405b", "--cluster", "a100-40gbx8", "--batch", "64", "--layout", "fsdp8.full.bf16")
    assert f"GPUs on which it fits  {told[1]} GPUs" in named


def test_a_number_of_gpus_that_goes_with_nothing_is_told_its_neighbours() -> None:
    text = run("llama3-8b", "--cluster", "h100x9", "--batch", "8")
    assert "9 GPUs and a batch of 8 cannot be cut so" in text
    assert re.search(r"GPUs near 9 over which model and batch can be cut +8 or 10", text)


def test_fewer_gpus_than_the_next_power_of_two_may_do() -> None:
    question = Question(preset_shape("llama3-8b"), Job(seq=4096, global_batch=512), read_cluster("h100x8"), WEFT)
    fewest = question.gpus_for(3 * 1e12 / 1e11)
    assert fewest is not None
    assert fewest.cluster.gpus == 40
    fewer = question.best(cluster=read_cluster("h100", 32))
    assert fewer is None or fewer.days > 30


def test_a_card_without_bf16_is_planned_in_fp16() -> None:
    best = search(preset_shape("llama3.2-1b"), JOB, read_cluster("v100-32gbx16")).best(3)
    assert {plan.layout.precision for plan in best} == {"fp16"}


def test_a_model_is_enough() -> None:
    arguments = ["llama3-8b", "--cluster", "h100x8", "--batch", "64", "--layout", "fsdp8.mb1.full.bf16"]
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.output == run(*arguments)
    for wrong, told in (("layout", "mean 'layouts'"), ("gpt2-124", "mean 'gpt2-124m'"), ("foo", "`weft models`")):
        refused = CliRunner().invoke(app, ["plan", wrong, *arguments[1:]])
        assert isinstance(refused.exception, ValueError)
        assert told in str(refused.exception)


def test_what_fits_and_weft_does_not_run_is_told_why() -> None:
    """Products in 8 bits want sides that are multiples of 16, and this model's are of 5,140."""
    text = run("gpt3-13b", "--cluster", "h100x8", "--fp8", "--batch", "512", "--seq", "512")
    assert "no layout that fits is one that weft runs: layout.precision = fp8" in text
    assert "model.hidden = 5140" in text


@pytest.mark.parametrize(
    ("model", "cluster", "batch"), [("mixtral-8x22b", "gh200x4", 3), ("deepseek-v3", "h100x48", 96)]
)
def test_experts_are_dealt_out_as_weft_can(model: str, cluster: str, batch: int) -> None:
    found = search(preset_shape(model), Job(seq=4096, global_batch=batch), read_cluster(cluster))
    refused = []
    for index in range(0, len(found), 1 + len(found) // 300):
        try:
            found.layout(index)
        except ValueError as error:
            refused.append(str(error))
    assert not [reason for reason in refused if "layout.ep" in reason]


def test_a_model_too_large_for_the_cluster() -> None:
    nothing = search(preset_shape("llama3-405b"), Job(seq=4096, global_batch=64), read_cluster("a100-40gbx8"))
    assert len(nothing.order) == 0
    assert nothing.best() == []
    assert nothing.rivals() == []
    told = nothing.nearest()
    assert told is not None
    assert told[1] is None


def test_on_the_command_line(tmp_path: Path) -> None:
    text = run("llama3-8b", "--cluster", "h100x16", "--batch", "128", "--tokens", "1e11", "--count", "3", "--days", "1")
    assert "16 × H100 SXM5 80 GB" in text
    for words in ("why not …", "memory of the fullest GPU", "time of a step", "GPUs for 1 day", "Nearest that fits"):
        assert words in text, words
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_from_shape(preset_shape("llama3-8b"))))
    layout = "fsdp8.mb1.full.bf16"
    one, other = (
        run(model, "--cluster", "h100x8", "--batch", "64", "--layout", layout) for model in ("llama3-8b", str(config))
    )
    assert one == other
    assert f"{layout} fits" in one
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    served = run(str(config), "--cluster", "h100x8", "--batch", "64", "--layout", layout)
    note = "quantization_config is of weights that are served; the plan is of those that are trained\n"
    assert note in served
    assert served.replace(note, "") == one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("llama3-8b", "--cluster", "h10", "--batch", "8"),
            r"no cluster 'h10': did you mean 'h100' or 'h100-96gb'\? The",
        ),
        (
            ("llama3-8b", "--cluster", "v100x8", "--batch", "8"),
            r"no cluster 'v100x8': did you mean 'v100-32gb'\? There",
        ),
        (
            ("llama3-8b", "--cluster", "none.toml", "--batch", "8"),
            "no cluster file none.toml: `weft plan calibrate --out none.toml` measures this machine",
        ),
        (("llama3-8b", "--cluster", "my.tomlx8", "--batch", "8"), "write gpus into my.toml"),
        (("llama3-8b", "--cluster", "tpu", "--batch", "8"), "no cluster 'tpu': There are a100-40gb, .*as in h100x64"),
        (("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--days", "0"), "--days 0: .*above 0"),
        (("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--days", "nan"), "--days nan: .*above 0"),
        (
            ("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--html", "/none/plan.html"),
            "--html /none/plan.html: there is no folder /none",
        ),
        (
            ("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--html", "/"),
            "--html / is a folder: name a file in it",
        ),
        (
            ("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--layout", "fsdp4"),
            "takes 4 GPUs and the cluster has 8",
        ),
        (("none.json", "--cluster", "h100x8", "--batch", "8"), "none.json cannot be read: No such file"),
        (
            ("gpt2-124m", "--cluster", "h100x8", "--batch", "8", "--seq", "4096"),
            "4,096 tokens are longer than the 1,024 learned positions",
        ),
        (("llama3-8b", "--cluster", "a100-80gbx8", "--batch", "8", "--fp8"), "8 bits no faster than 16: leave it out"),
        (
            ("llama3-8b", "--cluster", "a100-80gbx8", "--batch", "8", "--layout", "fsdp8.fp8"),
            "--layout fsdp8.fp8: A100 .* 8 bits no faster than 16",
        ),
        (
            ("llama3-8b", "--cluster", "v100-32gbx8", "--batch", "8", "--layout", "fsdp8.bf16"),
            "--layout fsdp8.bf16: V100 .* multiplies fp16 and no bf16",
        ),
        (("llama3-8b", "--cluster", "h100x8", "--batch", "8", "--fp8", "--layout", "fsdp8"), "--fp8 is of a search"),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


def test_a_cluster_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\ngpus = 16\nnetwork_gb_per_s = 12.5\n')
    shape, layout = (
        Shape(num_layers=16, hidden=4096, num_heads=32, ffn=14336, vocab=32000, max_seq=4096),
        Layout.parse("fsdp16.bf16.mb2"),
    )
    slow, fast = (Plan.of(shape, layout, JOB, read_cluster(name)) for name in (str(file), "h100x16"))
    assert slow.cluster.gpus == 16
    assert slow.seconds > fast.seconds
    assert slow.bytes == fast.bytes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('base = "h100"\ngpu = 16', "unknown setting 'gpu': did you mean 'gpus'"),
        ("base = 5", 'base = 5 is no name .* as in base = "h100"'),
        (
            "gpus = 8\nmemory_gb = 80",
            r"memory_gib, .*\(it says memory_gb, which weft does not know\): add what is missing",
        ),
        ("gpus = 8\npeak_tflops = 100", 'does not say peak_8bit_tflops, .*network_gb_per_s: .*base = "h100"'),
        ('base = "h100"\nmemory_gib = 80 GiB', "mine.toml is not TOML: .*line 2"),
        ('base = "h100"\nmemory_gib = 0', "memory_gib = 0: input should be greater than 0"),
        ('base = "h100"\nmemory_gib = 80e9', r"memory_gib = 8e\+10, and its base has .*see that the unit is right"),
        ('base = "h100"\npeak_tflops = 0.989', "peak_tflops = 0.989, and its base has .*see that the unit is right"),
        ('base = "h100"\nmemory_gb_per_s = 3.35', "memory_gb_per_s = 3.35, and its base has 3350: see that the unit"),
        (
            'base = "h100"\nnetwork_gb_per_s = 50e9',
            r"network_gb_per_s = 50000000000\.0: input should be less than or equal",
        ),
        (
            'base = "h100"\n[curves]\nprocesses = 2\nthreads = 1\ndevice = "cpu"\n[curves.grids.copy]\nax = []\n',
            "unknown setting 'curves.grids.copy.ax': did you mean 'axes'",
        ),
        ("\udcff", "mine.toml is not text in UTF-8"),
    ],
)
def test_a_cluster_that_is_written_wrong_says_what_to_change(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=told):
        read_cluster(str(file))


def test_a_slow_network_is_no_mistaken_unit(tmp_path: Path) -> None:
    """A gigabit a second between H100s is 400 times less than InfiniBand, and may be asked about."""
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\nnetwork_gb_per_s = 0.125')
    assert read_cluster(str(file)).network_gb_per_s == 0.125


def test_sizes_that_do_not_go_together_are_told_in_plain_words(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 3}
    file.write_text(json.dumps({"model_type": "other", "vocab_size": 512, **sizes}))
    done = CliRunner().invoke(app, ["plan", "layouts", str(file), "--cluster", "h100x8", "--batch", "8"])
    assert str(done.exception).endswith(
        "config.json of a other: model.num_kv_heads (3) must divide model.num_heads (4): each kv head serves the same "
        "number of query heads"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [("[]", "is no config.json: that is an object"), ('{"a', "is no JSON: "), ("\udcff", "is not text in UTF-8")],
)
def test_what_is_no_config_json_is_told_by_its_name(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"mine.json {told}"):
        run(str(file), "--cluster", "h100x8", "--batch", "8")


def test_no_sequence_is_longer_than_the_model_is_made_for_unless_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_from_shape(preset_shape("llama3.2-1b").model_copy(update={"max_seq": 2048}))))
    options = ("--cluster", "h100x8", "--batch", "8", "--count", "1")
    assert "8 sequences of 2,048 tokens a step" in run(str(file), *options)
    assert "8 sequences of 4,096 tokens a step" in run(str(file), *options, "--seq", "4096")


def test_a_clusters_title_is_no_markup(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\ntitle = "two [racks] of [bold]ours"\n')
    assert "8 × two [racks] of [bold]ours: " in run("llama3-8b", "--cluster", str(file), "--batch", "8", "--count", "1")


def test_a_search_of_a_large_model_tries_so_many() -> None:
    """Llama 3.1 405B on 16,384 GPUs: benchmarks/plan_search.py times this one."""
    found = search(preset_shape("llama3-405b"), Job(seq=8192, global_batch=2048), read_cluster("h100x16384"))
    assert 50_000 < len(found) < 90_000
    for axis, values in {"cp_kind": 3, "schedule": 5, "kind": 4, "recompute": 6, "offload": 4, "loss": 2}.items():
        assert len(np.unique(found.columns[axis])) == values, axis
    threes = search(preset_shape("llama3-8b"), Job(seq=4096, global_batch=96), read_cluster("h100x16"))
    assert 5 in threes.columns["schedule"]  # bfs, where micro-batches are no rounds of pp


def test_sizes_that_are_no_powers_of_two_are_tried() -> None:
    """12 heads and 3 sequences for each of 12 GPUs: all three at once are the fastest, by a third."""
    found = search(preset_shape("gpt2-124m"), Job(seq=1024, global_batch=36), read_cluster("a100-80gbx12"))
    assert {1, 2, 3, 4, 6} <= set(found.columns["tp"].tolist())
    assert {1, 2, 3, 6, 9, 18} <= set(found.columns["micro_batch"].tolist())
    assert str(found.best(1)[0].layout).startswith("fsdp12.mb3.")
    sixty = preset_shape("qwen3-30b-a3b")
    assert sixty.experts is not None
    sixty = sixty.model_copy(update={"experts": sixty.experts.model_copy(update={"num_experts": 60})})
    found = search(sixty, Job(seq=4096, global_batch=60), read_cluster("h100x60"))
    assert {1, 5, 12, 60} <= set(found.columns["ep"].tolist())


def drawn(gpus: int, draw: random.Random) -> Layout | None:
    """Any layout at all, of which a search knows nothing."""

    def part(of: int) -> int:
        return draw.choice([way for way in range(1, of + 1) if of % way == 0])

    pp = part(gpus)
    tp = part(gpus // pp)
    cp = draw.choice([1, part(gpus // pp // tp)])
    fsdp = part(gpus // pp // tp // cp)
    parts = {
        "pp": pp, "tp": tp, "cp": cp, "fsdp": fsdp, "dp": gpus // pp // tp // cp // fsdp, "zero": draw.choice([1, 2, 3]),
        "sp": tp > 1 and draw.random() < 0.6, "micro_batch": draw.choice([1, 1, 2, 2, 3, 4, 5, 6, 8, 12, 16, 24]),
        "recompute": draw.choice(["none", "none", "selective", "full", "full/2", "full/3", "redo-mlp", "redo-attention"]),
        "cp_kind": draw.choice(["ring", "allgather", "ulysses"]), "precision": "bf16",
        "schedule": draw.choice(["1f1b", "gpipe", "interleaved", "bfs", "zbh1", "zbv", "dualpipev"]) if pp > 1 else "1f1b",
        "loss": draw.choice(["whole", "whole", "whole", "chunked"]),
    }  # fmt: skip
    if parts["schedule"] in ("interleaved", "bfs"):
        parts["vp"] = draw.choice([2, 3, 4, 6, 8])
    if draw.random() < 0.25:
        parts[draw.choice(["offload", "offload_weights", "offload_optimizer"])] = True
    try:
        return Layout.model_validate(parts)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "seq"),
    [("gpt2-124m", "a100-80gbx12", 36, 1024), ("llama3-70b", "h100x48", 192, 8192), ("llama3-8b", "h100x8", 8, 65536)],
)
def test_no_layout_drawn_at_random_beats_a_search(model: str, cluster: str, batch: int, seq: int) -> None:
    found = search(preset_shape(model), Job(seq=seq, global_batch=batch), read_cluster(cluster))
    [best] = found.best(1)
    draw, fitting = random.Random(model), list[Plan]()
    while len(fitting) < 40:
        try:
            layout = drawn(best.cluster.gpus, draw)
            plan = found.plan(layout) if layout else None
        except ValueError:
            continue  # not with this model or batch
        if plan is not None and plan.sure:
            fitting.append(plan)
    assert not [str(plan.layout) for plan in fitting if plan.seconds < 0.999 * best.seconds], best.layout


def test_finer_savings_are_tried_where_memory_does_not_suffice(found: Search) -> None:
    columns = found.columns
    fine = (columns["offload"] > 0) | (columns["loss"] == 1) | np.isin(columns["recompute"], (2, 3, 5))
    assert 0 < fine.sum() < len(found)
    pairs = [name for name in AXES if name not in ("offload", "loss", "recompute")]
    plain = {tuple(columns[name][i] for name in pairs): i for i in np.flatnonzero(~fine & (columns["recompute"] == 0))}
    for kind in (1, 2, 3):
        for index in np.flatnonzero((columns["offload"] == kind) & (columns["recompute"] == 0))[:200]:
            assert not found.sure[plain[tuple(columns[name][index] for name in pairs)]]
    assert any(found.fits[fine])


def test_deepseek_is_planned() -> None:
    """Experts over ep, cut by tp or whole; and what is said of it."""
    found = search(preset_shape("deepseek-v2-lite"), Job(seq=4096, global_batch=256), read_cluster("h100x16"))
    best = found.best(3)
    assert len(best) == 3
    assert all(plan.layout.ep > 1 for plan in best)
    assert 0.1 < best[0].mfu(causal=True) < 0.6


def test_smaller_moments_make_room() -> None:
    question = Question(preset_shape("llama3-8b"), JOB, read_cluster("a100-40gbx8"), WEFT)
    best, small = question.best(), question.smaller_moments()
    assert best is not None
    assert small is not None
    assert small.seconds <= best.seconds
    answers = {answer.question: answer.answer for answer in question.answers(best, None, what_if=True)}
    assert "% time" in answers["optimizer.states = 8bit"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama3-8b", "fsdp8.mb1.bf16"), ("llama3-8b", "fsdp8.mb1.full.bf16"), ("llama3-8b", "fsdp8.mb1.selective.bf16"),
        ("llama3-8b", "fsdp8.mb1.full/2.bf16"), ("llama3-8b", "fsdp8.mb1.offload.bf16"),
        ("llama3-8b", "fsdp8.mb1.offloadweights.bf16"), ("llama3-8b", "fsdp8.mb1.offloadweights.full.bf16"),
        ("llama3-8b", "fsdp8.zero1.mb1.offloadweights.full.bf16"), ("llama3-8b", "fsdp8.mb1.offloadoptimizer.bf16"),
        ("llama3-8b", "mb1.offloadweights.full.bf16"), ("llama3-8b", "mb1.offloadoptimizer.full.bf16"),
        ("llama3-8b", "dp2.tp2.sp.pp2.mb1.offloadoptimizer.bf16"), ("llama3-8b", "fsdp2.zero1.pp4.mb1.full:4.bf16"),
        ("llama3-8b", "fsdp2.zero1.pp4.vp4.interleaved.mb1.full/2.bf16"),
        ("llama3-8b", "fsdp2.tp4.sp.mb1.bf16"), ("llama3-8b", "fsdp2.zero1.tp2.sp.pp2.mb1.bf16"),
        ("llama3-8b", "dp2.tp2.sp.pp2.mb1.bf16"), ("llama3-8b", "fsdp4.zero1.pp4.vp2.interleaved.mb1.bf16"),
        ("llama3-8b", "fsdp4.zero1.pp4.zbv.mb1.bf16"), ("llama3-8b", "fsdp4.cp2.ring.mb1.bf16"),
        ("llama3-70b", "fsdp8.zero2.tp4.sp.pp4.zbv.mb1.bf16"), ("llama3-70b", "fsdp4.zero2.pp4.zbh1.mb1.full.bf16"),
        ("llama3-70b", "fsdp4.zero2.tp4.sp.pp4.zbv.mb1.selective.bf16"),
        ("llama3-8b", "fsdp4.zero1.tp2.sp.pp2.zbh1.mb1.selective.bf16"),
        ("llama3-8b", "fsdp8.tp2.sp.mb2.selective.bf16"), ("qwen3-30b-a3b", "fsdp16.ep8.mb1.selective.bf16"),
        ("mixtral-8x7b", "fsdp16.ep8.mb1.bf16"), ("mixtral-8x7b", "fsdp16.ep8.mb1.full.bf16"),
        ("deepseek-v2-lite", "fsdp16.ep8.mb1.bf16"), ("llama3-70b", "fsdp8.zero1.tp8.sp.pp4.mb1.bf16"),
        ("llama3-8b", "fsdp2.cp4.ulysses.mb1.selective.bf16"), ("llama3-8b", "fsdp64.zero1.mb1.bf16"),
        ("deepseek-v2-lite", "fsdp16.cp4.ulysses.ep8.mb1.selective.bf16"),
        ("mixtral-8x7b", "fsdp8.zero1.ep8.pp8.zbh1.mb1.bf16"),
        ("llama3-8b", "fsdp8.mb1.redo-mlp.bf16"), ("llama3-8b", "fsdp2.zero1.tp2.sp.pp2.mb1.redo-mlp.bf16"),
        ("llama3-8b", "fsdp2.tp4.sp.mb1.redo-attention.bf16"), ("llama3-8b", "fsdp8.mb1.redo-attention+mlp.bf16"),
        ("llama3-8b", "fsdp8.mb1.keep-attention.bf16"), ("llama3-8b", "fsdp8.mb1.keep-matmul.bf16"),
        ("llama3-8b", "fsdp8.mb1.fit40g.bf16"),
        ("llama3-8b", "fsdp8.mb1.redo-mlp/2.bf16"), ("mixtral-8x7b", "fsdp16.ep8.mb1.redo-experts.bf16"),
        ("mixtral-8x7b", "fsdp16.zero1.ep8.mb1.redo-attention+experts.bf16"),
        ("mixtral-8x7b", "fsdp16.ep8.mb1.redo-mlp.bf16"), ("deepseek-v2-lite", "fsdp16.ep8.mb1.redo-experts.bf16"),
        ("qwen3-30b-a3b", "fsdp4.zero1.ep8.etp1.tp2.sp.pp2.mb1.redo-experts.bf16"),
        ("mistral-7b", "dp2.pp8.zbv.mb4.bf16"), ("qwen3-32b", "dp2.pp16.zbv.mb1.bf16"),
        ("llama3-405b", "tp8.sp.pp16.zbv.mb1.bf16"), ("llama3-8b", "fsdp2.cp4.ring.mb1.full.bf16"),
        ("llama3-8b", "fsdp2.cp4.mb1.full.bf16"), ("deepseek-v3", "fsdp16.cp2.ring.ep16.etp1.tp2.sp.mb1.full.bf16"),
    ],
)  # fmt: skip
def test_a_plan_has_the_memory_that_dry_run_counts(model: str, text: str) -> None:
    """A few terms in place of every moment of a step (plan/memory/moments.py, which is held against real runs)."""
    closed, counted = two_ways(model, text, 64, 8192)
    assert closed == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("model", "text", "batch", "seq"),
    [
        # tables that are a third of a model: gradients of the pass before, the head's, and a copy of an odd head
        ("gpt2-124m", "fsdp8.zero2.mb1.bf16", 64, 1024), ("gpt2-124m", "fsdp8.mb1.bf16", 64, 1024),
        ("qwen2.5-0.5b", "fsdp8.zero2.mb1.bf16", 64, 1024), ("llama3-8b", "fsdp8.mb1.chunked.bf16", 64, 8192),
        # logits of every micro-batch, and inputs of the head, where all go forward first
        ("qwen2.5-0.5b", "fsdp2.zero2.tp2.pp6.vp2.bfs.mb2.full.bf16", 1024, 2048),
        ("mistral-7b", "dp2.tp4.pp3.vp2.bfs.mb2.offload.bf16", 1024, 1024),
        # masks of a window
        ("mistral-7b", "fsdp2.zero1.cp2.ulysses.tp2.pp3.mb1.bf16", 8, 32768), ("mistral-7b", "fsdp2.mb1.bf16", 8, 16384),
        # the first process is the fullest, though the last has logits
        ("qwen3-30b-a3b", "dp2.cp2.ring.ep4.etp1.tp2.sp.pp9.mb16.full.bf16", 4096, 32768),
        # gradients of weights that are put off: who has a block more, and how many are in flight there
        ("qwen3-32b", "fsdp2.zero1.tp2.sp.pp16.zbv.mb8.selective.bf16", 256, 512),
        ("deepseek-v2-lite", "cp2.ring.etp1.tp4.sp.pp2.zbv.mb2.offloadoptimizer.bf16", 96, 4096),
        ("gpt3-350m", "pp16.zbh1.mb8.full.bf16", 1000, 1024),
        ("qwen3-8b", "fsdp4.zero2.tp2.sp.pp16.zbh1.mb1.bf16", 64, 1024),
        # inner states of experts that are cut
        ("mixtral-8x7b", "fsdp128.zero1.cp2.ulysses.ep8.etp2.tp2.sp.pp2.vp3.interleaved.mb4.bf16", 4096, 8192),
    ],
)  # fmt: skip
def test_the_same_of_what_is_told_by_its_ends(model: str, text: str, batch: int, seq: int) -> None:
    closed, counted = two_ways(model, text, batch, seq)
    assert closed == pytest.approx(counted, rel=0.1)


def test_weights_on_the_cpu_are_found_where_nothing_else_fits() -> None:
    """Llama 3 70B on one server of H100s: 16 bytes a parameter are more than it has."""
    found = search(preset_shape("llama3-70b"), Job(seq=4096, global_batch=64), read_cluster("h100x8"))
    best = found.best(3)
    assert best
    assert all(plan.layout.offload_weights for plan in best)
    assert best[0].time.offload + best[0].time.optimizer > 0.1 * best[0].seconds


def test_weights_travel_as_often_as_zero_says() -> None:
    """Up for each gathering, down for each reduction, on a bus that is slow enough to show it."""
    slow = read_cluster("h100x8").model_copy(update={"host_gb_per_s": 1, "host_memory_gb_per_s": 2})
    job, shape = Job(seq=4096, global_batch=64), preset_shape("llama3-8b")
    three, two, one = (
        Plan.of(shape, Layout.parse(f"fsdp8.{zero}mb1.offloadweights.full.bf16"), job, slow).time
        for zero in ("", "zero2.", "zero1.")
    )
    assert three.offload > two.offload > one.offload > 0
    trip = 4 * shape.num_params / 8 / 1e9
    assert one.offload == pytest.approx(2 * trip, rel=0.25)  # once up and once down, but for tables and computation
    assert one.optimizer == pytest.approx(7 * trip / (0.43 * 2), rel=0.1)


def test_an_optimizer_on_the_cpu_takes_its_bus_and_its_memory() -> None:
    """12 bytes of a parameter travel, 28 are moved there at 0.43 of what its memory gives, and 16 lie there."""
    cluster = read_cluster("h100x8").model_copy(update={"host_gb_per_s": 10, "host_memory_gb_per_s": 20})
    job, shape = Job(seq=4096, global_batch=64), preset_shape("llama3-8b")
    plain, away = (
        Plan.of(shape, Layout.parse(f"fsdp8.mb1{part}.full.bf16"), job, cluster) for part in ("", ".offloadoptimizer")
    )
    share = shape.num_params / 8
    assert away.time.offload == pytest.approx(12 * share / 10e9, rel=1e-3)
    assert away.time.optimizer == pytest.approx(28 * share / (0.43 * 20e9), rel=1e-3)
    assert away.seconds - plain.seconds == pytest.approx(away.time.offload + away.time.optimizer, rel=0.05)
    assert away.memory.host == pytest.approx(16 * share, rel=1e-3)
    assert plain.bytes - away.bytes == pytest.approx(8 * share, rel=1e-3)


def test_an_optimizer_on_the_cpu_is_found_where_it_is_worth_it() -> None:
    """Llama 3 70B on 8 H200s: without it more is computed again, and one step has many sequences."""
    found = search(preset_shape("llama3-70b"), Job(seq=4096, global_batch=512), read_cluster("h200x8"))
    [best] = found.best(1)
    assert best.layout.offload_optimizer
    assert best.memory.host > 0
    rivals = dict(found.rivals())
    assert min(plan.seconds for word, plan in rivals.items() if word.startswith("offload")) > best.seconds


def test_activations_go_to_the_cpu_beside_what_is_computed_again() -> None:
    """The same on GB200s, whose bus is fast: what selective recomputation keeps is less to carry."""
    found = search(preset_shape("llama3-70b"), Job(seq=4096, global_batch=512), read_cluster("gb200x8"))
    [best] = found.best(1)
    assert (best.layout.recompute, best.layout.offload) == ("selective", True)
    plain = found.plan(best.layout.model_copy(update={"recompute": "none"}))
    assert plain.seconds > best.seconds
    assert plain.memory.host > best.memory.host


def test_weights_on_the_cpu_of_a_single_gpu() -> None:
    found = search(preset_shape("llama3-8b"), Job(seq=4096, global_batch=64), read_cluster("h100x1"))
    [best] = found.best(1)
    assert best.layout.offload_weights


def test_nothing_is_offloaded_where_there_is_no_other_memory() -> None:
    found = search(preset_shape("gpt2-124m"), Job(seq=1024, global_batch=64), read_cluster("laptop-cpux2"))
    assert set(np.unique(found.columns["offload"])) == {0}


def test_a_search_in_8_bits_finds_layouts_that_train_so() -> None:
    found = search(preset_shape("llama3-8b"), JOB.model_copy(update={"matmul": "fp8"}), read_cluster("h100x16"))
    [best] = found.best(1)
    assert best.layout.precision == "fp8"
    alone = Plan.of(best.shape, best.layout, JOB, best.cluster)
    assert (alone.seconds, alone.mfu(causal=True)) == (best.seconds, best.mfu(causal=True))


def test_what_goes_to_the_cpu_fits_there() -> None:
    """Llama 3.1 405B takes 16 bytes a parameter, and eight A100s have 2 TB beside them."""
    words = ("llama3-405b", "--cluster", "a100-80gbx8", "--batch", "8", "--seq", "2048")
    layout = "fsdp8.mb1.offloadweights.full.bf16"
    plan = Plan.of(preset_shape(words[0]), Layout.parse(layout), Job(seq=2048, global_batch=8), read_cluster(words[2]))
    assert plan.bytes < plan.cluster.memory
    assert not plan.fits
    told = run(*words, "--layout", layout)
    assert "does not fit" in told
    assert "GiB of its CPU's 256 GiB" in told
    assert len(search(plan.shape, plan.job, plan.cluster).order) == 0


def test_a_deadline_may_take_less_than_a_node() -> None:
    """It was said that no number of processes would do, where four were enough: a laptop's node has room for 64."""
    job = Job(seq=64, global_batch=8, tokens=1e6)
    question = Question(preset_shape("gpt2-124m"), job, read_cluster("laptop-cpux4"), WEFT)
    found = question.gpus_for(1)
    assert found is not None
    assert (found.cluster.gpus, found.days < 1) == (1, True)
    half = question.gpus_for(found.days / 1.5)
    assert half is not None
    assert half.cluster.gpus == 2


def test_a_plan_of_processes_speaks_of_processes(tmp_path: Path) -> None:
    """Not of GPUs, which a laptop's has none of: on the terminal, and on the page."""
    words = ["--batch", "8", "--seq", "512", "--days", "1", "--what-if", "--html", str(tmp_path / "plan.html")]
    said = {}
    for machines in ("laptop-cpux2", "h100x2"):
        done = CliRunner().invoke(app, ["plan", "layouts", "gpt2-124m", "--cluster", machines, *words])
        assert done.exit_code == 0, done.output
        page = (tmp_path / "plan.html").read_text(encoding="utf-8")
        assert "One square is" in page
        assert "talk to each other" in page
        said[machines] = done.stdout + page
    assert "GPU" not in said["laptop-cpux2"]
    assert "NVLink" not in said["laptop-cpux2"]
    for told in ("{unit}-hours", "memory of the fullest {unit}", "{units} for 1 day", "GiB of the fullest {unit}"):
        assert told.format(unit="process", units="processes") in said["laptop-cpux2"]
        assert told.format(unit="GPU", units="GPUs") in said["h100x2"]
    none = search(preset_shape("gpt2-124m"), Job(seq=512, global_batch=1), read_cluster("laptop-cpux7"))
    assert refusal(none) == "no layout: 7 processes and a batch of 1 cannot be cut so"


def test_a_batch_that_is_too_small_for_more_processes_is_not_blamed_on_its_sequences_alone() -> None:
    for batch, told in (
        (4, "no number up to 65,536: take shorter sequences, or a larger batch"),
        (4096, "processes, "),
    ):
        job = Job(seq=512, global_batch=batch)
        question = Question(preset_shape("llama3-405b"), job, read_cluster("laptop-cpu"), WEFT)
        [answer] = question.more_gpus()
        assert told in answer.answer
