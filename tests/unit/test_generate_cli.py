"""`weft generate` as a user meets it: what it loads, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from checkpoints import save_step
from weft.checkpoint.weights import load_decoder
from weft.cli.generate import generate
from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape
from weft.serve.folder import end_tokens, find_model
from weft.serve.generate import complete
from weft.serve.requests.request import Sampling
from weft.serve.steps.device import pick_device, pick_dtype, room_on

SHAPE = Shape(family="qwen2", num_layers=2, hidden=32, num_heads=2, ffn=64, vocab=256, max_seq=96, tied=True)
APP = typer.Typer()
APP.command()(generate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of random weights, with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("weights") / "tiny"
    config = transformers.AutoConfig.for_model(**config_from_shape(SHAPE))
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    reference.save_pretrained(path)
    alphabet = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def completion(folder: Path, prompt: str, num_tokens: int) -> str:
    """The greedy one, by the parts that other tests prove."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, model = load_decoder(folder)
    ids = complete(model, [tokenizer.encode(prompt).ids], Sampling(max_tokens=num_tokens))[0]
    return tokenizer.decode(ids).rstrip("\ufffd")


def weft_generate(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], input=stdin)


def test_a_prompt_in_a_process_of_its_own(folder: Path) -> None:
    code = "import typer; from weft.cli.generate import generate; typer.run(generate)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "-", "--max-tokens", "20"],
        input="日本\n", capture_output=True, text=True, encoding="utf-8", timeout=60, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.stdout == completion(folder, "日本", 20) + "\n"
    assert done.stderr.startswith("20 tokens in ")
    assert done.stderr.endswith(" tokens/s\n")


def test_starting_needs_no_torch() -> None:
    code = "import sys, weft.cli.generate; print({'torch', 'numpy', 'pydantic', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_several_prompts_in_a_layout(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n\n  \ndog\n")
    done = weft_generate(folder, "a\nb", "--prompts-file", tmp_path / "prompts.txt", "--max-tokens", 9)
    texts = [completion(folder, prompt, 9) for prompt in ("a\nb", "cat", "dog")]
    assert done.stdout == f"[1/3] a b\n{texts[0]}\n\n[2/3] cat\n{texts[1]}\n\n[3/3] dog\n{texts[2]}\n"
    assert done.stderr.startswith("27 tokens in ")


def test_samples_differ_and_the_seed_repeats_them(folder: Path) -> None:
    arguments = [folder, "Hi", "--num-samples", 3, "--temperature", 1.2, "--top-k", 50, "--top-p", 0.95, "--seed", 4]
    first, second = (weft_generate(*arguments, "--max-tokens", 30).stdout for _ in range(2))
    assert first == second
    assert len({part.split("\n", 1)[1] for part in first.strip().split("\n\n[")}) == 3


def test_a_stop_text_and_a_dtype(folder: Path) -> None:
    whole = completion(folder, "Hi", 40)
    stop = whole[5:7]
    assert weft_generate(folder, "Hi", "--stop", stop, "--max-tokens", 40).stdout == whole.split(stop)[0] + "\n"
    assert weft_generate(folder, "Hi", "--dtype", "bfloat16", "--device", "cpu", "--max-tokens", 5).exit_code == 0


def test_a_text_that_the_contexts_end_cut_off_says_so(folder: Path) -> None:
    """And one that the model or `--max-tokens` ended does not."""
    alone = weft_generate(folder, "x" * 90, "--max-tokens", 40)
    assert alone.stderr.endswith("the model's context has no more than 96 tokens: the text ends there\n")
    several = weft_generate(folder, "x" * 90, "x" * 92, "Hi", "--max-tokens", 8)
    assert several.stderr.endswith("the model's context has no more than 96 tokens: 2 of 3 texts end there\n")
    for wanted in (("x" * 90, "--max-tokens", 6), ("Hi", "--max-tokens", 40)):
        assert "context" not in weft_generate(folder, *wanted).stderr


def test_an_adapter_changes_the_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    module = "base_model.model.model.layers.1.mlp.down_proj"
    tensors = {"A": torch.randn(2, SHAPE.ffn), "B": torch.randn(SHAPE.hidden, 2)}
    for size in (0, 1):
        parts = {f"{module}.lora_{matrix}.weight": size * tensor for matrix, tensor in tensors.items()}
        save_file(parts, tmp_path / "adapter_model.safetensors")
        text = weft_generate(folder, "Hi", "--max-tokens", 20, "--adapter", tmp_path).stdout
        assert (text.rstrip("\n") == completion(folder, "Hi", 20)) == (size == 0)


def test_a_run_gives_its_newest_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    older, newer = (save_step(folder, tmp_path, step) for step in (10, 20))
    assert find_model(tmp_path) == (newer / "model", [])
    assert find_model(older) == (older / "model", [])
    assert weft_generate(tmp_path, "Hi", "--max-tokens", 3).stdout == completion(folder, "Hi", 3) + "\n"

    weights = newer / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find_model(tmp_path)[0] == older / "model"
    done = weft_generate(tmp_path, "Hi", "--max-tokens", 3)
    assert done.stdout == completion(folder, "Hi", 3) + "\n"
    assert "warning: passed over a damaged checkpoint:" in done.stderr
    assert "step-00000020/model/model.safetensors" in done.stderr
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*step-00000020"):
        find_model(newer)
    (older / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000010/manifest\.json is missing"):
        find_model(tmp_path)


def test_end_tokens_come_from_the_generation_settings_first(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert end_tokens(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert end_tokens(tmp_path) == (5, 6)


def test_mistakes_are_answered_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "picture").write_bytes(b"\xff\xd8")
    half, damaged = tmp_path / "half", tmp_path / "damaged"
    for copy in (half, damaged):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (damaged / "tokenizer.json").write_text("{")
    for arguments, sentence in {
        (tmp_path / "nowhere", "Hi"): f"there is no folder {tmp_path / 'nowhere'}",
        (bare, "Hi"): f"{bare} holds no model",
        (tmp_path, "Hi"): f"{tmp_path} has no tokenizer.json",
        (folder,): "no prompt: give one behind the checkpoint",
        (folder, ""): "a prompt is empty",
        (folder, "-"): "a prompt is empty",
        (folder, "-", "-"): "the prompt - stands twice",
        (folder, "--prompts-file", tmp_path / "none"): f"--prompts-file: there is no file {tmp_path / 'none'}",
        (folder, "--prompts-file", tmp_path / "picture"): "picture is not text in UTF-8",
        (folder, "caf\udce9"): "a prompt is not text in UTF-8",
        (folder, "Hi", "--num-samples", 0): "--num-samples is 0",
        (folder, "Hi", "--num-samples", 2): "every sample is the same at temperature 0",
        (folder, "Hi", "--top-k", 5): "--top-k and --top-p choose by chance",
        (folder, "Hi", "--temperature", -1): "temperature is -1.0",
        (folder, "Hi", "--dtype", "int4"): "--dtype int4: choose fp32, bf16 or fp16",
        (folder, "Hi", "--device", "warp9"): "--device warp9 cannot be used",
        (folder, "Hi", "--adapter", bare): f"{bare} has no adapter_config.json",
        (folder, "Hi", "--adapter", tmp_path / "none"): f"--adapter: there is no directory {tmp_path / 'none'}",
        (damaged, "Hi"): f"{damaged / 'tokenizer.json'} is no tokenizer: EOF while parsing",
        (half, "x" * 96): "prompt 1: the prompt has 96 tokens; the context holds 96",  # before weights are looked for
        (half, "Hi", "--adapter", bare): f"{bare} has no adapter_config.json",
        (folder, "x" * 96): "prompt 1: the prompt has 96 tokens; the context holds 96",
    }.items():
        error = weft_generate(*arguments).exception
        assert isinstance(error, ValueError), arguments
        assert sentence in str(error)


def test_memory_that_is_not_there_is_a_sentence() -> None:
    said = r"no room on cpu; what helps: weights of fewer bits \(--dtype\); PyTorch says: "
    with pytest.raises(ValueError, match=said), room_on(torch.device("cpu")):
        torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(ValueError, match="PyTorch says: CUDA out of memory"), room_on(torch.device("cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match=r"^another$"), room_on(torch.device("cpu")):
        raise RuntimeError("another")


def test_auto_means_the_best_that_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
