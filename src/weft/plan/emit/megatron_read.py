"""An argument list of Megatron-LM, or the script that has it, as settings of weft. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from weft.config.load import explain, make_config
from weft.config.tree import Config, TrainConfig
from weft.models.shape import Shape
from weft.plan.emit import megatron_experts, megatron_recompute, megatron_stages
from weft.plan.emit.megatron import CHOICES, GRANTED, NUMBERS, OFFLOADED, SHARDING, SWITCHES, llama3_scaling
from weft.plan.emit.megatron_old import today
from weft.plan.emit.settings import put
from weft.plan.emit.shell import Options, one, read_script
from weft.plan.emit.shell_words import is_unset

ELSEWHERE = re.compile(
    r"--(save|load|no-save|no-load|log|logging|eval|tensorboard|wandb|data|tokenizer|vocab-file|merge-file|tiktoken|split|"
    r"num-workers|master|node-rank|rdzv|distributed-timeout|exit|profile|ckpt|dist-ckpt|auto-detect|timing|no-mmap|"
    r"no-create-attention-mask|manual-gc|empty-unused|container|mpi)\b"
)
OTHERS = re.compile(r"(bert|t5|ict|biencoder|retro|vision|vit|dino|inpaint|mamba|hybrid|multimodal|vlm|mimo)[^/]*\.py$")
"""Programs whose models are others, by words that have the same names."""
OWN: dict[str, Any] = {
    "optimizer.betas": (0.9, 0.999), "optimizer.weight_decay": 0.01, "schedule.kind": "linear", "schedule.min_ratio": 0.0,
}  # fmt: skip
"""Setting → what it is where Megatron's argument is left out, and weft's own default is another."""
DROPOUTS = ("--hidden-dropout", "--attention-dropout")
OWN_MODEL = {"norm_eps": 1e-5, "rope_theta": 10_000.0, "init_std": 0.02}
"""The same of a model's, whatever its family has."""
ABOUT = "about data, checkpoints, logs and the start, which weft has words of its own for"


def read(
    text: str, model: Shape | None = None, gpus: int | None = None, given: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """The run, and every argument that was not understood.

    Args:
        model: the model, if the file does not say it; of one that it does say, the vocabulary and the positions alone.
        gpus: where the file does not start torchrun.
        given: what the script is started with, and what its environment has, as NAME=VALUE.

    Raises:
        ValueError: something is missing, or weft does not have it; names the argument.
    """
    program, there, remarks = read_script(text, given)
    if OTHERS.search(program):
        raise ValueError(f"it starts {program}: weft reads the settings of decoders, such as pretrain_gpt.py has")
    if not there:
        raise ValueError("no argument, as --num-layers 32, is where the shell gets to: is it the right file?")
    today(there)
    remarks += _open(there)
    remarks += [f"{name} 0.1, Megatron's own where it is left out" for name in DROPOUTS if name not in there]
    told = {"--num-layers", "--hidden-size"} <= there.keys()
    tree: dict[str, Any] = {"model": dict(OWN_MODEL) if told else model.model_dump() if model else {}}
    _numbers(there, tree)
    _words(there, tree, has_model=not told)
    if "num_layers" not in tree["model"]:
        raise ValueError("the file has no --num-layers: name the model with --model")
    if "hidden" not in tree["model"]:
        raise ValueError("the file has no --hidden-size: name the model with --model")
    _lengths(tree, model)
    if "ffn" not in tree["model"]:  # Megatron's own
        wide = 4 * tree["model"]["hidden"]
        tree["model"]["ffn"] = int(wide * 2 / 3 / 64) * 64 if tree["model"]["activation"] == "swiglu" else wide
    layout = tree["layout"]
    _sharding(there, layout, gpus)
    remarks += _left_out(there, tree)
    _precision(there, layout)
    megatron_experts.take(there, tree["model"])
    tree["model"] = _family(tree["model"])
    layout["sp"] = layout.get("sp", False) and layout.get("tp", 1) > 1  # Megatron's own rule
    try:
        shape = Shape.model_validate(tree["model"])
    except ValidationError as error:
        raise ValueError(explain(error, Shape)) from None
    megatron_stages.take(there, layout, shape)
    remarks += megatron_recompute.take(there, layout, shape)
    left = [f"{name} {' '.join(values)}".strip() for name, values in there.items() if not ELSEWHERE.match(name)]
    elsewhere = [name for name in there if ELSEWHERE.match(name)]
    told_twice = " ".join(left)
    remarks = [remark for remark in remarks if remark not in told_twice]
    return make_config(tree), left + remarks + [f"{ABOUT}: {', '.join(elsewhere)}"] * bool(elsewhere)


def _open(there: Options) -> list[str]:
    """Words that the script does not say, and what else stands where a value does."""
    return [value for name, values in there.items() if not ELSEWHERE.match(name) for value in values if is_unset(value)]


def _lengths(tree: dict[str, Any], model: Shape | None) -> None:
    """What scripts leave to the tokenizer, or to another file."""
    sizes, seq = tree["model"], tree.get("train", {}).get("seq")
    if "vocab" not in sizes:
        if model is None:
            told = "the file has no --vocab-size, for the tokenizer has one"
            raise ValueError(f"{told}: add it, or name a model of that vocabulary with --model")
        sizes["vocab"] = model.vocab
    if "max_seq" not in sizes:
        if model is None and seq is None:
            raise ValueError(
                "the file has no --max-position-embeddings, nor --seq-length: add one, or name a model with --model"
            )
        sizes["max_seq"] = seq or (model.max_seq if model else None)


def _left_out(there: Options, tree: dict[str, Any]) -> list[str]:
    """What the run is where the file does not say it: Megatron's own where it has one."""
    layout, train = tree["layout"], tree.setdefault("train", {})
    said = list[str]()
    if "global_batch" not in train:
        train["global_batch"] = layout.get("micro_batch", 1) * layout["dp"] * layout.get("fsdp", 1)
    if "steps" not in train:
        train["steps"] = max(TrainConfig().steps, 2 * tree.get("schedule", {}).get("warmup", 0))
        said.append(f"the file does not say how many steps there are: train.steps = {train['steps']} is weft's")
    return said


def _numbers(there: Options, tree: dict[str, Any]) -> None:
    tree["layout"] = {}
    if there.pop("--group-query-attention", None) is None:
        there.pop("--num-query-groups", None)  # which Megatron then passes over
    elif "--num-layers" in there:
        there.setdefault("--num-query-groups", ["1"])
    for path, value in OWN.items():
        put(tree, path, value)
    for name, (path, kind) in NUMBERS.items():
        if name in there:
            put(tree, path, one(there, name, kind))
    _schedule(there, tree)
    betas = tree["optimizer"]["betas"]
    put(
        tree,
        "optimizer.betas",
        [
            one(there, name, float) if name in there else beta
            for name, beta in zip(("--adam-beta1", "--adam-beta2"), betas, strict=True)
        ],
    )
    if "--min-lr" in there and tree["optimizer"].get("lr"):
        put(tree, "schedule.min_ratio", round(one(there, "--min-lr", float) / tree["optimizer"]["lr"], 6))
    if there.pop("--use-rope-scaling", None) is not None:
        factor = one(there, "--rope-scaling-factor", float) if "--rope-scaling-factor" in there else 8.0
        put(tree, "model.rope_scaling", llama3_scaling(factor).model_dump())
    for name in GRANTED:
        there.pop(name, None)
    for name in DROPOUTS:
        if name in there and one(dict(there), name, float) == 0:
            del there[name]
    if there.get("--moe-router-load-balancing-type") == ["none"]:
        del there["--moe-router-load-balancing-type"]
    there.pop("--moe-token-dispatcher-type", None)


def _schedule(there: Options, tree: dict[str, Any]) -> None:
    """Samples are steps of a global batch; a fraction is of the steps in which the rate falls."""
    batch = tree.get("train", {}).get("global_batch")
    if batch and "--train-samples" in there:
        put(tree, "train.steps", one(there, "--train-samples", int) // batch)
        decay = one(dict(there), "--lr-decay-samples", int) if "--lr-decay-samples" in there else 0
        if decay // batch == tree["train"]["steps"]:
            there.pop("--lr-decay-samples", None)
    steps = tree.get("train", {}).get("steps")
    falls = one(dict(there), "--lr-decay-iters", int) if "--lr-decay-iters" in there else steps
    if batch and "--lr-warmup-samples" in there:
        put(tree, "schedule.warmup", one(there, "--lr-warmup-samples", int) // batch)
    elif falls and "--lr-warmup-fraction" in there:
        put(tree, "schedule.warmup", round(one(there, "--lr-warmup-fraction", float) * falls))
    if steps and falls and steps <= tree.get("schedule", {}).get("warmup", 0) < falls:
        put(tree, "train.steps", falls)  # of such a run the rates are the schedule's, which goes on without it
        there["--train-iters"], steps = [str(steps)], falls
    if steps and falls == steps:
        there.pop("--lr-decay-iters", None)
    if there.get("--lr-wsd-decay-style") == ["linear"]:
        del there["--lr-wsd-decay-style"]
        if "--lr-wsd-decay-iters" in there:
            put(tree, "schedule.decay", one(there, "--lr-wsd-decay-iters", int))
    elif there.get("--lr-decay-style") == ["WSD"]:
        there.setdefault("--lr-wsd-decay-style", ["exponential"])  # its own: not understood


def _words(there: Options, tree: dict[str, Any], *, has_model: bool) -> None:
    """Switches and words; what an absent one means is Megatron's default, unless the model is given."""
    for name, (path, with_it, without) in SWITCHES.items():
        if name in there:
            put(tree, path, with_it)
            del there[name]
        elif not (has_model and path.startswith("model.")):
            put(tree, path, without)
    if tree["layout"].get("cp", 1) == 1:
        there.pop("--cp-comm-type", None)
    for name, (path, words) in CHOICES.items():
        if path == "layout.cp_kind" and tree["layout"].get("cp", 1) == 1:
            continue
        if name in there:
            values = there.pop(name)
            if len(values) != 1 or values[0] not in words:
                raise ValueError(f"{name} {' '.join(values)}: weft has {', '.join(words)}")
            put(tree, path, words[values[0]])
        elif path == "layout.cp_kind":
            put(tree, path, "ring")
        elif path.startswith("model.") and not has_model:
            put(tree, path, {"model.norm": "layernorm", "model.positions": "learned"}[path])
    if not has_model:
        put(tree, "model.qkv_bias", tree["model"]["out_bias"] or there.pop("--add-qkv-bias", None) is not None)


def _sharding(there: Options, layout: dict[str, Any], gpus: int | None) -> None:
    if gpus is None:
        words = [value for name in ("--nproc-per-node", "--nnodes") for value in there.get(name, ["1"])[:1]]
        if "--nproc-per-node" not in there or not all(word.isdigit() for word in words):
            raise ValueError("the file does not say how many GPUs there are: say so with --gpus")
        gpus = one(there, "--nproc-per-node", int) * (one(there, "--nnodes", int) if "--nnodes" in there else 1)
    else:
        there.pop("--nproc-per-node", None), there.pop("--nnodes", None)
    inner = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    if inner < 1 or gpus % inner:
        size = f"tensor × pipeline × context parallel size = {inner}"
        raise ValueError(f"{gpus} GPUs are not a multiple of {size}: say how many there are with --gpus")
    replicas = gpus // inner
    copies = 1
    if "--num-distributed-optimizer-instances" in there:
        copies = one(there, "--num-distributed-optimizer-instances", int)
    sharded = there.pop("--use-distributed-optimizer", None) is not None
    zero = 1 if sharded else 0
    if there.pop("--deepspeed", None) is not None and "--zero-stage" in there:
        zero = one(there, "--zero-stage", int)
    if there.pop("--use-megatron-fsdp", None) is not None:
        words = there.pop("--data-parallel-sharding-strategy", ["optim_grads_params"])
        known = {"no_shard": 0, "optim": 1} | {word: stage for stage, word in SHARDING.items()}
        if words[0] not in known:
            raise ValueError(f"--data-parallel-sharding-strategy {words[0]}: weft has {', '.join(known)}")
        zero = known[words[0]]
    if there.get(OFFLOADED[0]) == [] and float(there.get("--optimizer-offload-fraction", ["1"])[0]) == 1:
        layout["offload_optimizer"] = True
        for name in (*OFFLOADED, "--optimizer-offload-fraction", "--overlap-cpu-optimizer-d2h-h2d"):
            there.pop(name, None)
    if zero and replicas // copies > 1:
        layout |= {"dp": copies, "fsdp": replicas // copies, "zero": zero}
    else:
        layout["dp"] = replicas


def _precision(there: Options, layout: dict[str, Any]) -> None:
    for name in ("fp16", "bf16"):
        if there.pop(f"--{name}", None) is not None:
            layout["precision"] = name
    if there.get("--fp8-recipe") == ["tensorwise"] and there.get("--fp8-format") == ["hybrid"]:
        layout["precision"] = "fp8"
        for name in ("--fp8-recipe", "--fp8-format", "--first-last-layers-bf16"):
            there.pop(name, None)
        for name in ("--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16"):
            if there.get(name) == ["1"]:
                del there[name]


def _family(model: dict[str, Any]) -> dict[str, Any]:
    if "family" in model:
        return model
    if model.get("positions") == "learned":
        family = "gpt2"
    elif model.get("latent"):
        family = "deepseek_v3" if (model.get("experts") or {}).get("scores") == "sigmoid" else "deepseek_v2"
    elif model.get("experts"):
        family = "qwen3_moe" if model["qk_norm"] else "mixtral"
    else:
        family = "qwen3" if model["qk_norm"] else "qwen2" if model["qkv_bias"] and not model["out_bias"] else "llama"
    return {"family": family, **model}
