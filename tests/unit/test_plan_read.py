"""`weft plan read`, of what others' files have: scripts as the shell goes through them, defaults, older names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.plan.emit import deepspeed, megatron_read
from weft.plan.emit.shell import read_script
from weft.plan.emit.systems import read
from weft.presets import preset_shape

PLAIN = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
--vocab-size 512 --micro-batch-size 1 --train-iters 100 --hidden-dropout 0 --attention-dropout 0
"""


def options(script: str, *given: str) -> dict[str, list[str]]:
    return read_script(script, given)[1]


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ('A=${B:-"${C:-4}"}\nrun --x $A', "4"),
        (": ${A:=3}\nrun --x $A", "3"),
        ("A=7\nrun --x ${A:+8}", "8"),
        ("A=(1 2 3)\nrun --x ${A[1]}${#A[@]}", "23"),
        ("A=2 ; B=$((A * 3 + $((8 / 4))))\nrun --x $B", "8"),
        ("A=2\nrun --x $(( A > 1 ? 5 : 6 ))", "5"),
        ("A=1\nif [ $A -gt 1 ]; then B=2; elif [[ $A == 1 && -z $C ]]; then B=3; else B=4; fi\nrun --x $B", "3"),
        ("A=xy\ncase $A in a|b) B=1 ;; x*) B=2 ;; *) B=3 ;; esac\nrun --x $B", "2"),
        ("f() { run --x $2; }\nf 1 9", "9"),
        ("[ 1 = 2 ] && A=1 || A=2\nrun --x $A", "2"),
        ("A=1\nA=$A$UNSET2\nB=\"--x $A --y\"\nsrun bash -c 'run $B'", "1$UNSET2"),
        ("for A in 1 2 3; do run --x $A; done", "3"),
        ("run --x 1 \\\n  # --x 2 \\\n  --y 2> log && echo done", "1"),
        ("cat > it.sh <<END\nrun --x 2\nEND\nrun --x 1", "1"),
        ("while [ $# -gt 0 ]; do case $1 in --a) A=$2; shift 2 ;; *) shift ;; esac; done\nrun --x $A", "6"),
    ],
)
def test_a_script_is_gone_through_as_the_shell_does_it(script: str, value: str) -> None:
    assert options(script, "--a", "6", "UNUSED=1")["--x"] == [value]


def test_only_what_the_program_is_given_counts() -> None:
    script = "OLD=(--num-layers 9)\nNEW=(--num-layers 4 --swiglu)\ntool.py --num-gpus 3\ntorchrun train.py ${NEW[@]}"
    assert read_script(script)[1] == {"--num-layers": ["4"], "--swiglu": []}
    program, there, remarks = read_script(f"{script}\ntorchrun train.py ${{OLD[@]}}")
    assert (program, there["--num-layers"]) == ("train.py", ["9"])
    assert remarks == ["the first 1 of 2 trainings that the file starts"]


def test_arguments_may_be_keys_of_yaml() -> None:
    text = "ENV_VARS:\n  A: 1\nMODEL_ARGS:\n  --num-layers: 4  # few\n  --bf16: true\n  --fp16: false\n  --x: 'E|(t|)*2L'\n"
    assert read_script(text)[1] == {"--num-layers": ["4"], "--bf16": [], "--x": ["E|(t|)*2L"]}


SIZES = """SIZE=$1
if [ $SIZE = 7B ]; then LAYERS=32
elif [ $SIZE = 13B ]; then LAYERS=40
fi
[ -f weights ] && MORE="--swiglu" || MORE=""
torchrun --nproc-per-node 8 pretrain_gpt.py --hidden-size 64 --num-layers $LAYERS $MORE
"""


def test_what_a_condition_decides_that_nobody_told_has_no_value() -> None:
    with pytest.raises(
        ValueError, match=r"--num-layers \$LAYERS \(it depends on: \$1 = 7B\).*what the script is started"
    ):
        megatron_read.read(SIZES)
    assert options(SIZES, "13B")["--num-layers"] == ["40", "$MORE (it depends on: -f weights)"]
    script = SIZES.replace("$LAYERS $MORE", "$LAYERS --bf16 $MORE") + PLAIN.partition("--num-attention")[2].join(
        [" --num-attention", ""]
    )
    _, unknown = megatron_read.read(script, given=["7B"])
    assert "$MORE (it depends on: -f weights)" in unknown
    assert options("A=1\nif [ -f x ]; then A=1; B+=' --y'; else B+=' --z'; fi\nrun --x $A $B") == {
        "--x": ["1"], "--y": [], "--z": [],
    }  # fmt: skip


def test_what_a_script_is_started_with_is_given_behind_its_name(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(
        f"torchrun --nproc-per-node 8 --nnodes $NODES pretrain_gpt.py --bf16 --lr $1 {' '.join(PLAIN.split())}"
    )
    refused = CliRunner().invoke(app, ["plan", "read", str(file)])
    assert "--lr $1: the file does not say it" in str(refused.exception)
    done = CliRunner().invoke(app, ["plan", "read", str(file), "1e-3", "NODES=2"])
    assert "lr = 0.001" in done.stdout
    assert "dp16.mb1.bf16" in done.stdout or "dp = 16" in done.stdout
    zero = tmp_path / "zero.json"
    zero.write_text('{"train_batch_size": 8}')
    done = CliRunner().invoke(app, ["plan", "read", str(zero), "1e-3", "--model", "llama3-8b"])
    assert "is not started with anything: leave 1e-3 out" in str(done.exception)


def test_of_a_model_that_the_file_says_only_the_vocabulary_is_asked() -> None:
    """The file's model is GPT's, and no part of the model beside it may get in."""
    text = PLAIN.replace("--vocab-size 512", "")
    model = megatron_read.read(text, preset_shape("llama3-8b"), 1)[0].model
    assert (model.vocab, model.ffn, model.num_kv_heads, model.head_dim) == (128256, 256, 4, 16)
    assert (model.norm, model.positions, model.tied, model.out_bias) == ("layernorm", "learned", True, True)
    rotary = (
        f"{text} --position-embedding-type rope --disable-bias-linear --swiglu --normalization RMSNorm --qk-layernorm"
    )
    model = megatron_read.read(rotary, preset_shape("llama3-8b"), 1)[0].model
    assert (model.family, model.rope_theta, model.norm_eps, model.rope_scaling) == ("qwen3", 10000, 1e-5, None)


@pytest.mark.parametrize(
    ("arguments", "heads"),
    [("--num-query-groups 2", 4), ("--group-query-attention", 1), ("--group-query-attention --num-query-groups 2", 2),
     ("--num-key-value-heads 2", 2)],
)  # fmt: skip
def test_groups_of_queries_are_as_megatron_takes_them(arguments: str, heads: int) -> None:
    assert megatron_read.read(f"{PLAIN} {arguments}", gpus=1)[0].model.num_kv_heads == heads


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ("--deepspeed --zero-stage 2 --bf16", "fsdp8.zero2.mb1.bf16"),
        ("--model-parallel-size 2", "dp4.tp2.mb1"),
        ("--checkpoint-activations --checkpoint-num-layers 1", "dp8.mb1.full"),
        ("--recompute-activations", "dp8.mb1.selective"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 0", "dp8.mb1"),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", "dp4.pp2.stages1-3.mb1"),
        ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3", "dp4.pp2.stages1-3.mb1"),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout \"'Et|t*3,L'\"", "dp4.pp2.stages1-3.mb1"),
        ("--cp-comm-type a2a", "dp8.mb1"),
    ],
)
def test_layouts_in_other_words(arguments: str, layout: str) -> None:
    text = PLAIN if "pipeline" not in arguments else f"{PLAIN} --global-batch-size 16"
    assert str(megatron_read.read(f"{text} {arguments}", gpus=8)[0].layout) == layout


def test_a_file_that_is_no_text_is_said_to_be_none(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_bytes(b"\xab\x00")
    done = CliRunner().invoke(app, ["plan", "read", str(file)])
    assert str(done.exception).startswith(f"{file} is not text in UTF-8")


MIXTURE = "--num-experts 8 --moe-layer-freq"
LATENT = (
    "--untie-embeddings-and-output-weights --multi-latent-attention --kv-lora-rank 8 --qk-layernorm --rope-type rope"
)


@pytest.mark.parametrize(
    ("model", "modules", "recompute", "said"),
    [
        ("", "core_attn layernorm", "selective", ""),
        ("", "mlp", "redo-mlp", ""),
        ("", "moe", "none", ""),
        (f"{MIXTURE} 1", "mlp", "none", ""),
        (f"{MIXTURE} 1", "moe", "redo-mlp", ""),
        (f"{MIXTURE} [0]*1+[1]*3", "mlp", "none", "none, which keeps dense MLPs"),
        (f"{MIXTURE} [0]*1+[1]*3", "moe", "redo-mlp", "redo-mlp, which also computes again dense MLPs"),
        (f"{MIXTURE} [0]*1+[1]*3", "mlp moe", "redo-mlp", ""),
        (f"{MIXTURE} 1", "moe_act", "selective", "selective, which also computes again norms"),
        (LATENT, "mla_up_proj", "redo-attention", "redo-attention, which also computes again all else of attention"),
        (LATENT, "mla_up_proj mlp layernorm", "redo-attention+mlp", "again all else of attention"),
        (
            f"{LATENT} {MIXTURE} 1", "mla_up_proj moe_act", "redo-attention+experts",
            "again all else of attention, experts' products",
        ),
        (f"{MIXTURE} 1", "shared_experts router", "none", "none, which keeps router"),
    ],
)  # fmt: skip
def test_recomputed_modules_are_read_as_what_is_nearest_and_the_difference_is_said(
    model: str, modules: str, recompute: str, said: str
) -> None:
    family = "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear"
    arguments = f"{PLAIN} {family} {model} --bf16 --recompute-granularity selective --recompute-modules {modules}"
    config, unknown = megatron_read.read(arguments, gpus=8)
    assert config.layout.recompute == recompute
    told = [line for line in unknown if "recompute" in line]
    assert len(told) == bool(said)
    assert all(line.startswith(f"of --recompute-modules {modules} ") and line.endswith(said) for line in told)


def test_what_a_script_leaves_out_is_megatrons_and_is_said() -> None:
    text = PLAIN.replace("--train-iters 100 --hidden-dropout 0", "") + "--lr-warmup-iters 2000 --bf16"
    config, unknown = megatron_read.read(text, gpus=8)
    assert (config.train.global_batch, config.train.steps) == (8, 4000)
    assert "--hidden-dropout 0.1, Megatron's own where it is left out" in unknown
    assert "the file does not say how many steps there are: train.steps = 4000 is weft's" in unknown


def test_a_run_that_ends_in_the_warm_up_has_the_rates_of_its_schedule() -> None:
    text = PLAIN.replace("--train-iters 100", "--train-iters 50 --lr-decay-iters 1000 --lr-warmup-fraction 0.1")
    config, unknown = megatron_read.read(text, gpus=1)
    assert (config.train.steps, config.schedule.warmup) == (1000, 100)
    assert "--train-iters 50" in unknown


EXPERTS = "--num-experts 8 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rotary"


@pytest.mark.parametrize(("freq", "dense"), [("[0]+[1]*3", 1), ("'([0]*2+[1]*2)'", 2), ("[0,1,1,1]", 1), ("[1]*4", 0)])
def test_blocks_without_experts_in_every_spelling(freq: str, dense: int) -> None:
    experts = megatron_read.read(f'{PLAIN} {EXPERTS} --moe-layer-freq "{freq}"', gpus=1)[0].model.experts
    assert experts is not None
    assert (experts.dense_layers, experts.per_token, experts.ffn) == (dense, 2, 128)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"torchrun pretrain_bert.py {' '.join(PLAIN.split())}", r"it starts pretrain_bert.py: weft reads .* decoders"),
        (f'{PLAIN} {EXPERTS} --moe-layer-freq "[0,1]*2"', r"--moe-layer-freq \[0,1\]\*2: weft's blocks"),
        (PLAIN.replace("--hidden-size 64", ""), "no --hidden-size: name the model"),
        (f"{PLAIN} --pipeline-model-parallel-size 8", "--num-layers 4: too few for 8 stages"),
        (f"{PLAIN} {EXPERTS} --multi-latent-attention --rotary-scaling-factor 40", "--mscale-all-dim 0"),
        (f"torchrun --nproc-per-node $(nproc) pretrain_gpt.py {' '.join(PLAIN.split())}", "say so with --gpus"),
        (PLAIN.replace("layers 4", "layers -1"), "num_layers is -1"),
        (
            f"{PLAIN} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4L",
            "1 stages are not dealt out",
        ),
        ("echo 'a", "what closes"),
        ("if [ 1 = 1 ]; then echo", "ends in the middle"),
    ],
)
def test_what_is_refused_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        megatron_read.read(text, gpus=None if "nproc" in text else 8)


def of_deepspeed(tree: dict[str, Any], gpus: int = 8) -> tuple[Any, list[str]]:
    return deepspeed.read(json.dumps(tree), preset_shape("llama3-8b"), gpus)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no argument, as --num-layers 32, is where the shell gets to"),
        ("[]", "no argument, as --num-layers 32, is where the shell gets to"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "what it says lies too deep"),
    ],
)
def test_a_file_that_says_nothing_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "none.sh"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        read(file, preset_shape("gpt2-124m"), 8)


def test_a_json_has_no_length_of_sequences_which_is_told(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"train_batch_size": 8}')
    done = CliRunner().invoke(app, ["plan", "read", str(file), "--model", "gpt2-124m", "--gpus", "8"])
    assert done.stderr == "the file says no length of sequences: train.seq is the longest of the model, 1024\n"
    assert "seq = 1024" in done.stdout


def test_what_a_program_fills_in_is_not_deepspeeds_own() -> None:
    auto = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
    tree = {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
        "scheduler": {"type": "WarmupDecayLR", "params": auto},
    }
    config, unknown = of_deepspeed({**tree, "train_batch_size": 8})
    assert (config.optimizer.lr, config.schedule.warmup) == (2e-5, 0)
    assert 'scheduler.params.warmup_num_steps = "auto"' in unknown
    del auto["warmup_num_steps"]
    config, unknown = of_deepspeed({**tree, "train_batch_size": 8})
    assert (config.schedule.warmup, config.train.steps) == (1002, 2004)
    assert any("how many steps there are: train.steps = 2004" in told for told in unknown)


def test_older_and_odd_keys_of_deepspeed() -> None:
    zero = {"stage": 2, "cpu_offload": True, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"}
    config, unknown = of_deepspeed(
        {
            "train_batch_size": 32,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero,
            "bf16": {"enabled": "false"},
        }
    )
    assert str(config.layout) == "fsdp8.zero2.mb2.offloadoptimizer"
    [how] = unknown
    assert how == "about how, not what: zero_optimization.overlap_comm, zero_optimization.stage3_prefetch_bucket_size"
    config, unknown = of_deepspeed({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert config.layout.offload_weights
    assert any("offload_optimizer" in told and "only where weights stay" in told for told in unknown)
