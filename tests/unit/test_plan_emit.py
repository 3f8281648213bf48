"""`weft plan layouts --emit` and `weft plan read`: there and back, what is refused, what is named."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config.layout import Layout
from weft.config.load import load_config, make_config
from weft.config.tree import Config, ScheduleConfig
from weft.plan.emit.megatron_stages import stage_sizes
from weft.plan.emit.shell import read_script
from weft.plan.emit.systems import WRITERS, fastest, read, run_of, write
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.search import search
from weft.presets import preset_shape


def a_run(model: str, layout: str, batch: int = 512) -> Config:
    return run_of(preset_shape(model), Layout.parse(layout), Job(seq=2048, global_batch=batch))


def there_and_back(config: Config, system: str, tmp_path: Path, **known: object) -> tuple[Config, list[str]]:
    file = tmp_path / "settings"
    file.write_text(write(config, system).text)
    return read(file, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama3-70b", "fsdp8.zero1.tp8.sp.pp4.mb1.full.bf16"),
        ("llama3-70b", "dp2.fsdp4.zero1.tp8.sp.pp4.vp5.interleaved.mb1.bf16"),
        ("llama3-70b", "fsdp4.tp8.sp.pp2.stages39-41.mb1.full:12.bf16.bf16grads"),
        ("llama3-8b", "dp4.fsdp8.cp2.ring.mb1.selective.bf16"),
        ("llama3-8b", "fsdp8.zero2.cp4.ulysses.mb2.redo-mlp.fp8"),
        ("llama3-8b", "dp8.cp2.mb1.fp16"),
        ("llama3-8b", "fsdp8.zero1.mb1.offloadoptimizer.bf16"),
        ("mixtral-8x7b", "fsdp8.zero1.ep8.etp1.tp2.sp.mb1.bf16"),
        ("mixtral-8x7b", "fsdp8.zero1.ep8.mb1.redo-mlp.bf16"),
        ("qwen3-8b", "fsdp8.zero1.mb1.bf16"),
        ("gpt3-13b", "dp8.tp2.mb4"),
        ("deepseek-v3", "fsdp64.zero1.ep64.etp1.tp2.sp.pp8.mb1.full.bf16"),
        ("deepseek-v2-lite", "fsdp8.zero1.ep8.mb1.bf16"),
    ],
)
def test_megatron_and_back_is_the_same_run(model: str, layout: str, tmp_path: Path) -> None:
    config = a_run(model, layout)
    back, unknown = there_and_back(config, "megatron", tmp_path)
    assert not unknown
    assert str(back.layout) == layout
    sizes = {"num_layers", "hidden", "ffn", "num_heads", "num_kv_heads", "head_dim", "vocab", "experts", "tied"}
    switches = {
        "positions",
        "norm",
        "activation",
        "qkv_bias",
        "out_bias",
        "qk_norm",
        "rope_theta",
        "norm_eps",
        "rope_scaling",
        "latent",
        "yarn",
    }
    assert back.model.model_dump(include=sizes | switches) == config.model.model_dump(include=sizes | switches)
    assert (back.train, back.optimizer, back.schedule) == (config.train, config.optimizer, config.schedule)


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp8.zero1.mb2.bf16",
        "dp4.mb2.fp16",
        "fsdp8.mb1.bf16.bf16grads",
        "fsdp8.mb1",
        "fsdp8.mb1.offloadweights",
        "fsdp8.mb1.offloadoptimizer",
    ],
)
def test_deepspeed_and_back_is_the_same_layout(layout: str, tmp_path: Path) -> None:
    config = a_run("llama3-8b", layout, 64)
    back, unknown = there_and_back(config, "deepspeed", tmp_path, model=config.model)
    assert not unknown
    assert str(back.layout) == layout
    assert (back.train.global_batch, back.optimizer) == (64, config.optimizer)


def test_what_a_file_leaves_out_is_that_systems_own(tmp_path: Path) -> None:
    """Megatron's arguments and DeepSpeed's AdamW have defaults, which are not weft's."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}))
    back, unknown = read(file, model=preset_shape("llama3-8b"), gpus=8)
    assert not unknown
    assert (back.optimizer.lr, back.optimizer.betas, back.optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert back.schedule.kind == "constant"
    file.write_text(
        json.dumps({"train_batch_size": 8, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}})
    )
    assert read(file, model=preset_shape("llama3-8b"), gpus=8)[1] == ['scheduler.params.warmup_type = "log"']
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0, "warmup_num_steps": [9]}}
    file.write_text(json.dumps({"train_batch_size": 8, "scheduler": scheduler}))
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        read(file, model=preset_shape("llama3-8b"), gpus=8)
    script = tmp_path / "run.sh"
    script.write_text("torchrun --nproc-per-node 8 pretrain_gpt.py --lr 1e-4 --global-batch-size 8 --adam-beta1 0.8")
    back, _ = read(script, model=preset_shape("llama3-8b"))
    assert (back.optimizer.betas, back.optimizer.weight_decay) == ((0.8, 0.999), 0.01)
    assert (back.schedule.kind, back.schedule.min_ratio) == ("linear", 0.0)


def test_nemo_has_the_optimizer_and_the_steps() -> None:
    """Its own recipe of AdamW and cosine has another epsilon, and ten steps."""
    config = a_run("llama3-8b", "fsdp8.zero1.mb1.bf16")
    text = write(config, "nemo").text
    for words in (
        "adam_eps=1e-08",
        "weight_decay=0.1",
        "adam_beta2=0.95",
        f"max_steps={config.train.steps},",
        f"max_steps={config.train.steps - 1}, warmup_steps=0",  # its scheduler counts from 0
        "precision.grad_reduce_in_fp32 = True",
    ):
        assert words in text
    with pytest.raises(ValueError, match=r"schedule\.kind = wsd: this file writes cosine"):
        write(config.model_copy(update={"schedule": ScheduleConfig(kind="wsd")}), "nemo")


def test_groups_that_deepspeed_had_before_are_read(tmp_path: Path) -> None:
    """`mics_shard_size`, which 0.19 refuses."""
    file = tmp_path / "old.json"
    keys = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8}
    file.write_text(json.dumps(keys | {"zero_optimization": {"stage": 3, "mics_shard_size": 4}}))
    back, unknown = read(file, model=preset_shape("llama3-8b"))
    assert not unknown
    assert (back.layout.dp, back.layout.fsdp, back.layout.zero) == (2, 4, 3)


CONNECTIONS = "export CUDA_DEVICE_MAX_CONNECTIONS=1"


@pytest.mark.parametrize(
    ("layout", "there"),
    [
        ("fsdp8.zero1.mb1.bf16", []),
        ("fsdp4.zero1.tp2.sp.mb1.bf16", [CONNECTIONS]),
        ("dp4.cp2.mb1.bf16", [CONNECTIONS]),
        ("fsdp8.mb1.bf16", ["--ckpt-format fsdp_dtensor"]),
        ("fsdp4.zero2.tp2.sp.mb1.bf16", ["--ckpt-format fsdp_dtensor"]),
    ],
)
def test_what_megatron_refuses_a_script_without(layout: str, there: list[str]) -> None:
    """Its validate_args, of August 2026: tp and cp want one connection, its FSDP none and a format of its own, and
    --rotary-base is a whole number."""
    text = write(a_run("llama3-8b", layout), "megatron").text
    assert [line for line in (CONNECTIONS, "--ckpt-format fsdp_dtensor") if line in text] == there
    assert "--rotary-base 500000 " in text


def test_a_rotary_base_that_megatron_cannot_read_is_refused() -> None:
    shape = preset_shape("llama3-8b").model_copy(update={"rope_theta": 10000.5})
    config = run_of(shape, Layout.parse("dp8.mb1"), Job(seq=2048, global_batch=64))
    with pytest.raises(ValueError, match=r"model.rope_theta = 10000.5: its --rotary-base is a whole number"):
        write(config, "megatron")


def test_weft_and_back_is_the_same_run(tmp_path: Path) -> None:
    config = a_run("llama3-8b", "fsdp8.mb1.zero2.bf16", 64)
    file = tmp_path / "run.toml"
    file.write_text(write(config, "weft").text)
    assert load_config([file]) == config


@pytest.mark.parametrize(
    ("system", "model", "layout", "reason"),
    [
        (
            "megatron",
            "llama3-8b",
            "dp2.pp4.zbv.mb1.bf16",
            "layout.schedule = zbv: its pipelines run 1f1b and interleaved",
        ),
        ("megatron", "llama3-8b", "fsdp8.mb1.fp8row", "layout.precision = fp8row"),
        ("megatron", "llama3-8b", "fsdp8.mb1.full/2.bf16", "layout.recompute = full/2"),
        ("megatron", "mixtral-8x7b", "fsdp8.tp2.mb1.bf16", "needs layout.sp"),
        ("megatron", "llama3-8b", "fsdp8.mb1.offloadoptimizer.bf16", "offload_optimizer: .*zero1 with fsdp above 1"),
        ("torchtitan", "llama3-8b", "fsdp8.mb1.offloadoptimizer.bf16", "layout.offload_optimizer"),
        ("nemo", "llama3-8b", "fsdp8.zero1.mb1.offloadoptimizer.bf16", "layout.offload_optimizer"),
        ("nemo", "llama3-8b", "dp2.pp4.gpipe.mb1.bf16", "NeMo cannot run this: layout.schedule = gpipe"),
        ("nemo", "llama3-8b", "fsdp8.mb1.bf16", "layout.zero = 3"),
        ("deepspeed", "llama3-8b", "dp4.tp2.mb1", "layout.tp = 2"),
        ("deepspeed", "llama3-8b", "dp2.fsdp4.zero1.mb1", "shards over all replicas"),
        ("deepspeed", "llama3-8b", "dp2.fsdp4.mb1", "0.19 has no MiCS"),
        ("deepspeed", "llama3-8b", "fsdp8.zero2.mb1.offloadweights", "only stage 3 has weights to offload"),
        ("torchtitan", "llama3-8b", "dp2.pp4.zbh1.mb1.bf16", "layout.schedule = zbh1"),
        ("torchtitan", "llama3-8b", "fsdp4.tp2.mb1.bf16", "always cuts the sequence"),
        ("torchtitan", "gpt3-13b", "fsdp8.mb1.bf16", "takes models by name"),
        ("torchtitan", "llama3-8b", "dp4.tp2.sp.mb1", "layout.dp beside tp or pp, without fsdp"),
        ("torchtitan", "llama3-8b", "tp8.sp.mb1.bf16", "layout.precision = bf16 with tp or pp, without fsdp or cp"),
        ("jax", "llama3-8b", "dp2", "weft writes for weft, megatron, deepspeed, torchtitan, nemo"),
    ],
)
def test_what_a_system_cannot_run_is_refused(system: str, model: str, layout: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write(a_run(model, layout), system)


def test_torchtitan_has_every_axis() -> None:
    text = write(
        a_run("llama3-70b", "dp2.fsdp8.cp2.ring.tp4.sp.pp4.vp2.interleaved.mb1.full/2.fp8row"), "torchtitan"
    ).text
    tree = tomllib.loads(text)
    degrees = {name: tree["parallelism"][f"{name}_parallel_degree"] for name in ("tensor", "context", "pipeline")}
    assert degrees == {"tensor": 4, "context": 2, "pipeline": 4}
    assert tree["parallelism"]["data_parallel_replicate_degree"] == 2
    assert tree["parallelism"]["data_parallel_shard_degree"] == 8
    parts = tree["parallelism"]["module_fqns_per_model_part"]
    assert len(parts) == 8
    assert [name for part in parts for name in part][1:81] == [f"layers.{block}" for block in range(80)]
    assert tree["activation_checkpoint"] == {"mode": "selective", "selective_ac_option": "2"}
    assert tree["training"]["local_batch_size"] == 512 // 16
    assert tree["quantize"]["linear"]["float8"]["recipe_name"] == "rowwise"


def test_nemo_is_python_and_has_every_axis() -> None:
    text = write(a_run("mixtral-8x7b", "fsdp8.zero1.ep8.etp1.tp2.sp.pp4.mb1.full.bf16"), "nemo").text
    compile(text, "recipe.py", "exec")
    for line in (
        "tensor_model_parallel_size=2", "expert_model_parallel_size=8", "pipeline_model_parallel_size=4",
        "expert_tensor_parallel_size=1", "num_nodes=8", "recompute_granularity='full'", "num_moe_experts=8",
    ):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("system", WRITERS)
def test_every_system_writes_what_it_can(system: str) -> None:
    assert write(a_run("llama3-8b", "fsdp8.zero1.mb1.bf16" if system in ("nemo",) else "fsdp8.mb1.bf16"), system).text


def test_remarks_are_comments_of_the_file() -> None:
    written = write(a_run("llama3-8b", "fsdp8.mb1.chunked.bf16"), "megatron")
    assert any("layout.loss = chunked" in remark for remark in written.remarks)
    assert all(f"# {remark}" in written.text for remark in written.remarks)
    for model, kept in (("mixtral-8x7b", True), ("llama3-8b", False)):
        remarks = " ".join(write(a_run(model, "fsdp8.zero1.mb1.redo-mlp.bf16"), "megatron").remarks)
        assert ("makes the norm before experts again" in remarks) == kept


SCRIPT = """#!/bin/bash
TP=4
GPUS_PER_NODE=8
MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008
    --seq-length 4096 --max-position-embeddings 4096 --vocab-size 32000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights  # as in Llama 2
)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes ${NNODES:-2} pretrain_gpt.py ${MODEL_ARGS[@]} \\
    --tensor-model-parallel-size ${TP} --sequence-parallel --use-distributed-optimizer --bf16 \\
    --micro-batch-size 1 --global-batch-size=64 --recompute-granularity full --recompute-method uniform \\
    --recompute-num-layers 1 --squared-relu --save /somewhere \\
    --train-iters 1000 --hidden-dropout 0 --attention-dropout 0
"""


def test_a_script_is_read_and_what_is_unknown_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pretrain.sh"
    file.write_text(SCRIPT)
    config, unknown = read(file)
    assert str(config.layout) == "fsdp4.zero1.tp4.sp.mb1.full.bf16"
    assert (config.model.num_layers, config.model.num_kv_heads, config.train.global_batch) == (32, 32, 64)
    about = "about data, checkpoints, logs and the start, which weft has words of its own for: --save"
    assert unknown == ["--squared-relu", about]
    done = CliRunner().invoke(app, ["plan", "read", str(file)])
    assert "not understood, and left out: --squared-relu" in done.stderr
    saved = tmp_path / "run.toml"
    saved.write_text(done.stdout)
    assert load_config([saved]) == config


SCRIPT_OF_FUNCTIONS = """#!/bin/bash
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-4}
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))
TP=${TP:-1} ; PP=2
PP=2
STRATEGY=${STRATEGY:-"optim_grads_params"}
DATA_PATH=$1 #<Specify path>
MODEL_ARGS=(
    --num-layers 8
    --hidden-size 512   # small
    --num-attention-heads 8
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights
    --seq-length 1024 --max-position-embeddings 1024
)
if [[ "$DATA_PATH" == "MOCK" ]]; then
    DATA_ARGS+=(
        "--vocab-size 32000"
        "--split '99,1,0'"
    )
else
    DATA_ARGS+=("--data-path $DATA_PATH")
fi
TRAINING_ARGS=(
    --micro-batch-size 1 --global-batch-size 128 --bf16 --hidden-dropout 0 --attention-dropout 0
    --train-samples 1280000 --lr-decay-samples 1280000 --lr-warmup-samples 12800
    --tensor-model-parallel-size ${TP:-1} --pipeline-model-parallel-size $PP --sequence-parallel
    --use-megatron-fsdp --data-parallel-sharding-strategy ${STRATEGY} --save $2
)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES pretrain_gpt.py \\
    ${MODEL_ARGS[@]} "${DATA_ARGS[@]}" ${TRAINING_ARGS[@]}
"""
"""As those that come with Megatron-LM are: arrays, defaults, conditions, options and values in one string."""


def test_a_script_of_arrays_and_defaults_is_read(tmp_path: Path) -> None:
    file = tmp_path / "train.sh"
    file.write_text(SCRIPT_OF_FUNCTIONS)
    config, unknown = read(file)
    assert str(config.layout) == "fsdp16.pp2.stages4-4.mb1.bf16"  # and no sp, for there is no tp
    assert (config.model.vocab, config.model.hidden, config.train.global_batch) == (32000, 512, 128)
    assert (config.train.steps, config.schedule.warmup) == (10000, 100)
    [told] = unknown
    assert told == (
        "about data, checkpoints, logs and the start, which weft has words of its own for: --split, --data-path, --save"
    )
    numbers = {"--a": ["6"], "--b": ["x y"], "--c": []}
    assert read_script('N=3\nM=$(($N*2))\nrun.py --a ${M} --b="x y" ${REST[@]} --c')[1] == numbers


def test_a_vocabulary_that_only_the_tokenizer_knows_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "train.sh"
    file.write_text(SCRIPT_OF_FUNCTIONS.replace("--vocab-size 32000", ""))
    with pytest.raises(
        ValueError, match=r"no --vocab-size, for the tokenizer has one: add it, or name a model .* --model"
    ):
        read(file)
    file.write_text(SCRIPT_OF_FUNCTIONS.replace("PP=2", "PP=8"))
    with pytest.raises(ValueError, match=r"12 GPUs are not a multiple of .* = 8: say how many there are with --gpus"):
        read(file, gpus=12)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--moe-layer-freq 2", r"--moe-layer-freq 2: weft's blocks without experts are the first"),
        ("--moe-shared-expert-intermediate-size 100", "weft's is a multiple of an expert's 64"),
    ],
)
def test_experts_that_weft_does_not_have_are_named(argument: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "train.sh"
    experts = f"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64 {argument}"
    file.write_text(SCRIPT_OF_FUNCTIONS.replace("--num-layers 8", f"--num-layers 8 {experts}"))
    with pytest.raises(ValueError, match=said):
        read(file)
    file.write_text(file.read_text().replace(argument, ""))
    experts_of_both = [read(file, shape)[0].model.experts for shape in (None, preset_shape("llama3-8b"))]
    assert all(one is not None and (one.num_experts, one.ffn) == (8, 64) for one in experts_of_both)


def test_the_fastest_layout_that_a_system_can_run_is_written(tmp_path: Path) -> None:
    """The very fastest has a schedule without a bubble, which Megatron-LM does not have."""
    file = tmp_path / "run.sh"
    words = "plan layouts llama3-8b --cluster h100x16 --batch 128 --emit megatron --out"
    done = CliRunner().invoke(app, [*words.split(), str(file)])
    assert done.exit_code == 0, done.output
    found = search(preset_shape("llama3-8b"), Job(seq=4096, global_batch=128), read_cluster("h100x16"))
    best = found.best(1)[0]
    written = read(file)[0].layout
    with pytest.raises(ValueError, match=r"layout\.schedule"):
        write(run_of(best.shape, best.layout, best.job), "megatron")
    assert f"megatron: the fastest that it can run is {written}, which takes " in done.stderr
    for _, layout in found.layouts(found.order):
        if layout == written:
            break
        with pytest.raises(ValueError, match="cannot run this"):
            write(run_of(found.shape, layout, found.job), "megatron")
    with pytest.raises(ValueError, match="takes models by name"):
        fastest(search(preset_shape("gpt3-13b"), Job(seq=2048, global_batch=64), read_cluster("h100x8")), "torchtitan")


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "arguments.txt"
    file.write_text("--micro-batch-size 1 --global-batch-size 8")
    with pytest.raises(ValueError, match="no --num-layers: name the model with --model"):
        read(file)
    with pytest.raises(ValueError, match=r"how many GPUs.*--gpus"):
        read(file, preset_shape("llama3-8b"))
    assert read(file, preset_shape("llama3-8b"), 8)[0].layout.dp == 8
    file.write_text(
        json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto", "fp8": {"enabled": True}})
    )
    with pytest.raises(ValueError, match="does not say the model"):
        read(file)
    unknown = read(file, preset_shape("llama3-8b"), 8)[1]
    assert unknown == ['train_micro_batch_size_per_gpu = "auto"', "fp8.enabled = true"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"hidden_size": 64}', "is not DeepSpeed's: it has none of train_batch_size"),
        ('{"fp16": @HERE}', "is no JSON: Expect"),
    ],
)
def test_a_json_of_something_else_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read(file, preset_shape("llama3-8b"), 8)


def test_stages_of_a_pipeline_as_megatron_writes_them() -> None:
    assert stage_sizes("Et*3|(tt|)*2,tL") == [3, 2, 2, 1]
    with pytest.raises(ValueError, match="weft reads"):
        stage_sizes("Et|mL")


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    words = "plan layouts llama3-8b --cluster h100x8 --batch 64 --layout fsdp8.mb1.full.bf16 --emit megatron --out"
    done = CliRunner().invoke(app, [*words.split(), str(file)])
    assert done.exit_code == 0, done.output
    assert str(read(file)[0].layout) == "fsdp8.mb1.full.bf16"


@pytest.mark.parametrize("named", [[], ["--layout", "fsdp8.mb1.full.bf16"]])
def test_without_a_file_the_settings_are_all_that_is_on_stdout(named: list[str], tmp_path: Path) -> None:
    """Where stderr is no terminal either, as in a script."""
    arguments = ["plan", "llama3-8b", "--cluster", "h100x8", "--batch", "64", "--emit", "weft", *named]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (tmp_path / "run.toml").write_text(done.stdout)
    assert load_config([tmp_path / "run.toml"]).train.global_batch == 64
    assert "memory of the fullest GPU" in done.stderr


def test_fp16_weights_are_not_said_to_be_bf16() -> None:
    config = make_config({"model": {"preset": "gpt2-124m"}, "layout": "fsdp8.mb8.fp16", "train": {"global_batch": 64}})
    remarks = " ".join(write(config, "megatron").remarks)
    assert "Weights are fp16 beside an fp32 copy" in remarks
    assert "Weights are bf16" not in remarks
