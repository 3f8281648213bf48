"""`weft export` copies a model bit for bit, in little memory, and leaves nothing behind when it cannot."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from weft.checkpoint.region import Region
from weft.checkpoint.tensors import TensorFile
from weft.checkpoint.weights import WeightsFolder, create_weights_folder, load_decoder
from weft.cli.export import export, parse_size
from weft.export import huggingface as export_module
from weft.export.huggingface import export_huggingface
from weft.export.source import check_source
from weft.models.huggingface import shape_from_config

COMMON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_positions=40, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, head_dim=8),
    "llama3": lambda: transformers.LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=10),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=10, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**COMMON | LATENT),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**COMMON | LATENT, n_group=2, topk_group=1),
}  # fmt: skip


def model_in(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for tensor in (*model.parameters(), *(x for name, x in model.named_buffers() if name.endswith("_bias"))):
        torch.nn.init.normal_(tensor, std=0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **how)
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_export_is_its_source_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model_in(source, kind, dtype, max_shard_size="20KB")
    result = export_huggingface(source, target, shard_bytes=9_000)
    assert result.proved
    assert result.num_files > 1
    before, after = tensors_in(source), tensors_in(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape, bits(tensor)) == (after[name].dtype, after[name].shape, bits(after[name]))
    old, new = (transformers.AutoConfig.from_pretrained(folder) for folder in (source, target))
    assert shape_from_config(new.to_dict()) == shape_from_config(old.to_dict())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        assert getattr(new, key) == getattr(old, key)
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (source, target)]
    assert generation[0] == generation[1]
    _, info = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = export_huggingface(target, tmp_path / "again")
    assert again.num_files == 1
    assert {name: bits(tensor) for name, tensor in tensors_in(tmp_path / "again").items()} == {
        name: bits(tensor) for name, tensor in before.items()
    }


def test_one_file_of_one_dtype_is_the_very_file_of_transformers(tmp_path: Path) -> None:
    model_in(tmp_path / "source", "llama")
    export_huggingface(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/model.safetensors").read_bytes() == (tmp_path / "source/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_what_the_source_rounds_to(dtype: torch.dtype, tmp_path: Path) -> None:
    model_in(tmp_path / "source", "gpt2")
    export_huggingface(tmp_path / "source", tmp_path / "target", dtype)
    before, after = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "target")
    assert all(bits(after[name]) == bits(tensor.to(dtype)) for name, tensor in before.items())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "target").dtype == dtype


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    model_in(tmp_path / "source", "llama")
    with WeightsFolder.open(tmp_path / "source", writable=True) as folder:
        folder.write(Region.whole("norm.weight", (24,)), torch.full((24,), 1e5))
    with pytest.raises(ValueError, match=r"norm\.weight holds 1e\+05, too large for float16"):
        export_huggingface(tmp_path / "source", tmp_path / "target", torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    export_huggingface(tmp_path / "source", tmp_path / "target", torch.bfloat16)


def test_tensors_keep_their_own_dtypes(tmp_path: Path) -> None:
    """Norms in fp32 beside matrices in bf16 stay so."""
    shape = shape_from_config(CONFIGS["llama"]().to_dict())
    with create_weights_folder(tmp_path / "plain", shape, torch.float32) as plain:
        kinds = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in plain.dtypes()}
    create_weights_folder(tmp_path / "source", shape, kinds).close()
    export_huggingface(tmp_path / "source", tmp_path / "target")
    assert {name: tensor.dtype for name, tensor in tensors_in(tmp_path / "target").items()} == kinds


@pytest.mark.parametrize("how", ["bit", "config", "missing"])
def test_a_damaged_copy_is_found_and_removed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_in(tmp_path / "source", "gpt2")
    write = export_module._write

    def damage(folder: WeightsFolder, path: Path, *rest: Any) -> list[str]:
        names = write(folder, path, *rest)
        if how == "bit":
            data = bytearray((path / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (path / "model.safetensors").write_bytes(data)
        elif how == "config":
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
        else:
            tensors = load_file(path / "model.safetensors")
            del tensors["transformer.ln_f.bias"]
            from safetensors.torch import save_file

            save_file(tensors, path / "model.safetensors")
        return names

    monkeypatch.setattr(export_module, "_write", damage)
    said = {"bit": "differs from .* between", "config": "describes another model", "missing": r"differs .*\.ln_f\.bias"}
    with pytest.raises(ValueError, match=said[how]):
        export_huggingface(tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_targets_that_exist_are_never_written_over(tmp_path: Path) -> None:
    model_in(tmp_path / "source", "gpt2")
    (tmp_path / "target").mkdir()
    export_huggingface(tmp_path / "source", tmp_path / "target")  # an empty folder is no loss
    before = (tmp_path / "target/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists: name a new folder"):
        export_huggingface(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/model.safetensors").read_bytes() == before
    (tmp_path / "new.tmp").mkdir()
    with pytest.raises(ValueError, match=r"new\.tmp exists, perhaps of an export that was killed"):
        export_huggingface(tmp_path / "source", tmp_path / "new")
    with pytest.raises(ValueError, match="exists: name a new folder"):
        export_huggingface(tmp_path / "source", tmp_path / "source")
    with pytest.raises(ValueError, match=r"config\.json cannot be made a folder"):
        export_huggingface(tmp_path / "source", tmp_path / "source" / "config.json" / "in")


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_in(tmp_path / "source", "gpt2")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r" has 1,000 bytes of room, and the weights need up to [\d,]{5,}$"):
        export_huggingface(tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


MEASURE = """
import re, sys
from pathlib import Path
import torch
from weft.checkpoint.weights import create_weights_folder
from weft.export.huggingface import export_huggingface
from weft.models.shape import Shape

def export(folder, ffn, vocab):
    shape = Shape(num_layers=3, hidden=512, num_heads=8, ffn=ffn, vocab=vocab, max_seq=64, tied=True)
    create_weights_folder(folder / "source", shape, torch.float32).close()
    export_huggingface(folder / "source", folder / "target", torch.bfloat16 if "bf16" in sys.argv else None)
    return shape

# getrusage would count what the parent held before exec
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
folder = Path(sys.argv[1])
export(folder / "small", 64, 64)  # every import and buffer is there now
before = peak()
shape = export(folder / "large", 8000, 40_000)
print(peak() - before, 4 * shape.vocab * shape.hidden, 4 * shape.num_params)
"""


@pytest.mark.parametrize("dtype", ["same", "bf16"])
def test_memory_stays_below_two_of_the_largest_tensor(dtype: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    growth, largest, total = map(int, said.split())
    assert total > 230e6
    assert growth < 2 * largest < total


app = typer.Typer()
app.command()(export)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def checkpoint_in(folder: Path) -> Path:
    """A checkpoint as the trainer leaves it, of weights alone."""
    from weft.checkpoint.inspection import read_header
    from weft.checkpoint.manifest import FileRecord, Manifest, RegionRecord

    step = folder / "checkpoints" / "step-00000007"
    model_in(step / "model", "llama")
    (step / "model/tokenizer.json").write_text("{}")
    files = {}
    for file in sorted((step / "model").iterdir()):
        name, size = f"model/{file.name}", file.stat().st_size
        if file.suffix != ".safetensors":
            files[name] = FileRecord(size=size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
            continue
        with TensorFile(file) as tensors:
            regions = [
                RegionRecord(
                    tensor=key, start=[0] * len(entry.sizes), stop=list(entry.sizes), sha256=tensors.digest(key)
                )
                for key, entry in tensors.entries.items()
            ]
        header = hashlib.sha256(read_header(file)).hexdigest()
        files[name] = FileRecord(size=size, header=header, regions=regions)
    (step / "manifest.json").write_bytes(Manifest(step=7, layout="1", files=files).to_json())
    return step


def test_command_exports_a_folder_a_checkpoint_and_a_run(tmp_path: Path) -> None:
    step = checkpoint_in(tmp_path / "run")
    for n, source in enumerate((step / "model", step, tmp_path / "run")):
        result = run(source, tmp_path / f"out{n}", "--shard-size", "10KB")
        assert result.exit_code == 0, result.output
        assert "float32" in result.output
        assert "tokenizer: tokenizer.json" in result.output
        assert "proved: read back by the safetensors library, bit for bit" in result.output
        load_decoder(tmp_path / f"out{n}")
    result = run(step, tmp_path / "half", "--dtype", "bf16", "--no-verify")
    assert "not proved" in result.output
    assert "bfloat16" in result.output


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_command_refuses_a_damaged_checkpoint(file: str, tmp_path: Path) -> None:
    step = checkpoint_in(tmp_path)
    data = bytearray((step / "model" / file).read_bytes())
    data[-3] ^= 1
    (step / "model" / file).write_bytes(data)
    result = run(step, tmp_path / "out")
    assert isinstance(result.exception, ValueError)
    assert f"{file} is damaged: " in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_only_checkpoints_have_a_manifest(tmp_path: Path) -> None:
    model_in(tmp_path / "model", "gpt2")
    assert not check_source(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "int4"), "--dtype int4: choose fp32, bf16 or fp16"),
        (("--shard-size", "big"), "'big' is not a size"),
    ],
)
def test_command_refuses_what_it_does_not_know(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "out", *arguments)
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5GiB": 3 << 29, "1000": 1000, "2 kb": 2000, "3MiB": 3 << 20}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "0", "5TBs", "1e9"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)
