"""What `weft plan layouts --emit` writes, as the systems compute with it: learning rates, clipping, sums, flavors."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from weft.config.layout import Layout
from weft.config.tree import Config, ScheduleConfig
from weft.models.shape import Shape
from weft.plan.emit.systems import read, run_of, write
from weft.plan.numbers import Job
from weft.presets import preset_shape
from weft.train.schedule import learning_rate


def a_run(layout: str, **schedule: Any) -> Config:
    config = run_of(preset_shape("llama3-8b"), Layout.parse(layout), Job(seq=2048, global_batch=512))
    return config.model_copy(update={"schedule": ScheduleConfig(**schedule)})


def there_and_back(config: Config, system: str, tmp_path: Path, **known: Any) -> tuple[Config, list[str]]:
    file = tmp_path / "settings"
    file.write_text(write(config, system).text)
    return read(file, **known)


SCHEDULED = [
    ScheduleConfig(kind="cosine", warmup=20, min_ratio=0.05), ScheduleConfig(kind="linear", min_ratio=0.2),
    ScheduleConfig(kind="constant", warmup=20),
]  # fmt: skip


@pytest.mark.parametrize(
    "schedule", [*SCHEDULED, ScheduleConfig(kind="wsd", warmup=20, decay=30)], ids=lambda it: it.kind
)
def test_learning_rates_go_to_megatron_and_back(schedule: ScheduleConfig, tmp_path: Path) -> None:
    config = a_run("fsdp8.zero1.mb1.bf16", **schedule.model_dump())
    back, unknown = there_and_back(config, "megatron", tmp_path)
    assert not unknown
    assert back.schedule == schedule


@pytest.mark.parametrize("schedule", SCHEDULED, ids=lambda it: it.kind)
def test_learning_rates_go_to_deepspeed_and_back(schedule: ScheduleConfig, tmp_path: Path) -> None:
    config = a_run("fsdp8.mb1.bf16", **schedule.model_dump())
    back, unknown = there_and_back(config, "deepspeed", tmp_path, model=config.model)
    assert not unknown
    rates = [
        [learning_rate(step, one.schedule, peak=one.optimizer.lr, steps=one.train.steps) for step in (1, 20, 60, 500)]
        for one in (config, back)
    ]
    assert rates[0] == rates[1]


def deepspeed_rate(step: int, scheduler: dict[str, Any], peak: float) -> float:
    """What DeepSpeed 0.19 gives a step: its schedulers count from -1, and are asked after each step."""
    number, there = step - 2, scheduler["params"]
    warmup = max(2, there["warmup_num_steps"])
    if scheduler["type"] == "WarmupCosineLR":
        start = there["warmup_min_ratio"]
        if number < warmup:
            return peak * (start + (1 - start) * number / warmup) if number >= 0 else 0.0
        progress = min(1.0, (number - warmup + 1) / max(1, there["total_num_steps"] - warmup))
        return peak * (there["cos_min_ratio"] + (1 - there["cos_min_ratio"]) * (1 + math.cos(math.pi * progress)) / 2)
    low, high = there["warmup_min_lr"], there["warmup_max_lr"]
    if number < warmup:
        return low + (high - low) * max(0, number) / warmup
    ends = there.get("total_num_steps")
    return low + (high - low) * ((ends - number) / (ends - warmup) if ends else 1.0)


@pytest.mark.parametrize("warmup", [0, 1, 3, 4, 20])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_deepspeed_has_the_rates_after_the_warm_up(kind: str, warmup: int) -> None:
    """Its schedulers are a step or two late, and are told to be earlier. `benchmarks/emitted.py` asks DeepSpeed itself."""
    schedule = ScheduleConfig.model_validate({"kind": kind, "warmup": warmup})
    config = a_run("fsdp8.mb1.bf16", **schedule.model_dump())
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 100})})
    written = write(config, "deepspeed")
    peak, scheduler = config.optimizer.lr, json.loads(written.text)["scheduler"]
    theirs = [deepspeed_rate(step, scheduler, peak) for step in range(1, 101)]
    ours = [learning_rate(step, schedule, peak=peak, steps=100) for step in range(1, 101)]
    if warmup > 3:
        assert theirs[warmup:] == pytest.approx(ours[warmup:])
        before = {"cosine": [0.0, *ours[: warmup - 1]], "constant": [ours[1], *ours[1:warmup]]}
        assert theirs[:warmup] == pytest.approx(before.get(kind, theirs[:warmup]))
    assert theirs[-1] == pytest.approx(ours[-1])
    first = max(4, warmup)
    assert max(abs(one - two) for one, two in zip(theirs[first:], ours[first:], strict=True)) < 0.04 * peak
    assert any("Learning rates" in remark for remark in written.remarks) == (kind != "constant" or warmup > 1)


def test_a_start_of_a_warm_up_that_weft_does_not_have_is_named(tmp_path: Path) -> None:
    file, params = tmp_path / "zero.json", {"warmup_num_steps": 9, "warmup_min_ratio": 0.5, "warmup_type": "linear"}
    scheduler = {"type": "WarmupCosineLR", "params": {**params, "total_num_steps": 99}}
    file.write_text(json.dumps({"train_batch_size": 8, "scheduler": scheduler}))
    back, unknown = read(file, model=preset_shape("llama3-8b"), gpus=8)
    assert unknown == ["scheduler.params.warmup_min_ratio = 0.5"]
    assert (back.schedule.warmup, back.train.steps) == (10, 100)


def test_without_zero_deepspeed_adds_gradients_up_as_it_computes(tmp_path: Path) -> None:
    """It refuses fp32 there; and where its JSON does not say what they are added up in, it is that too."""
    written = write(a_run("dp8.mb1.bf16"), "deepspeed")
    assert json.loads(written.text)["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "Gradients are bf16: without ZeRO it adds them up as it computes." in written.remarks
    assert "Adam's first step counts as its second: without ZeRO an empty one comes before it." in written.remarks
    assert json.loads(write(a_run("fsdp8.mb1.bf16"), "deepspeed").text)["data_types"] == {"grad_accum_dtype": "fp32"}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}}))
    assert str(read(file, model=preset_shape("llama3-8b"), gpus=8)[0].layout) == "dp8.bf16.bf16grads"


def test_learning_rates_that_deepspeed_does_not_have_are_said_to_be_the_programs() -> None:
    config = a_run("fsdp8.mb1.bf16", kind="wsd")
    written = write(config, "deepspeed")
    assert "scheduler" not in json.loads(written.text)
    assert "schedule.kind = wsd is your program's." in written.remarks


@pytest.mark.parametrize(
    ("schedule", "there"),
    [
        (ScheduleConfig(warmup=20), {"warmup_steps": 20, "decay_type": "cosine", "min_lr_factor": 0.1}),
        (ScheduleConfig(kind="linear"), {"warmup_steps": 0, "decay_type": "linear", "min_lr_factor": 0.1}),
        (ScheduleConfig(kind="constant"), {"warmup_steps": 0, "decay_type": "linear", "min_lr_factor": 1.0}),
    ],
    ids=lambda it: it.kind if isinstance(it, ScheduleConfig) else "",
)
def test_torchtitan_has_the_learning_rates(schedule: ScheduleConfig, there: dict[str, object]) -> None:
    config = a_run("fsdp8.mb1.bf16", **schedule.model_dump())
    assert tomllib.loads(write(config, "torchtitan").text)["lr_scheduler"] == there


def test_torchtitan_is_told_of_no_clipping_as_it_has_it() -> None:
    """With max_norm = 0 it makes all gradients 0."""
    config = a_run("fsdp8.mb1.bf16")
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip_norm": 0.0})})
    assert tomllib.loads(write(config, "torchtitan").text)["training"]["max_norm"] == math.inf


@pytest.mark.parametrize(
    ("layout", "times", "how"),
    [
        ("dp4", 1 / 4, "4 times too small under DDP"),
        ("dp2.fsdp2", 1.0, ""),
        ("dp2.cp2.ring", 1.0, ""),
        ("fsdp2.pp2", 512 * 2048, "1048576 times too large in a pipeline"),
    ],
)
def test_torchtitans_limits_are_as_its_gradients(layout: str, times: float, how: str) -> None:
    """Version 0.2.2 divides the loss by the tokens of all replicas, and DDP once more; in a pipeline nothing does."""
    written = write(a_run(layout), "torchtitan")
    tree = tomllib.loads(written.text)
    assert (tree["training"]["max_norm"], tree["optimizer"]["eps"]) == (times, pytest.approx(1e-8 * times))
    remarks = [remark for remark in written.remarks if remark.startswith("Gradients are")]
    assert remarks == ([f"Gradients are {how}, and so are max_norm and eps."] if how else [])


@pytest.mark.parametrize(
    ("tree", "there"),
    [
        (
            {"family": "llama", "num_heads": 4, "ffn": 160},
            'llama3_args["weft"] = TransformerModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256, '
            "max_seq_len=64, norm_eps=1e-05, rope_theta=10000.0, multiple_of=160, ffn_dim_multiplier=0.9411764705882353, "
            "rope_scaling_args=RoPEScalingArgs(1.0, 1.0, 4.0, 8192))",
        ),
        (
            {"family": "qwen3", "num_heads": 4, "ffn": 192, "head_dim": 32, "tied": True},
            'qwen3_args["weft"] = Qwen3ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256, '
            "max_seq_len=64, norm_eps=1e-06, rope_theta=1000000.0, head_dim=32, hidden_dim=192, qk_norm=True, "
            "enable_weight_tying=True)",
        ),
    ],
    ids=["llama", "qwen3"],
)
def test_a_model_of_another_size_is_a_flavor_to_add(tree: dict[str, Any], there: str) -> None:
    shape = Shape.model_validate({"num_layers": 2, "hidden": 64, "num_kv_heads": 2, "vocab": 256, "max_seq": 64} | tree)
    written = write(run_of(shape, Layout.parse("fsdp2"), Job(seq=64, global_batch=8)), "torchtitan")
    assert f"The flavor is yours to add: {there}" in written.remarks
    assert tomllib.loads(written.text)["model"] == {"name": there.partition("_")[0], "flavor": "weft"}
