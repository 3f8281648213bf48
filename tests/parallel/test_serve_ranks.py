"""A model served by several processes says what one process says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import MODELS, run_forked, warm_compiler
from safetensors.torch import save_file

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder, load_decoder
from weft.models.decoder import Decoder
from weft.models.parameters import stored_sizes
from weft.models.places import places
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.cut import ranks
from weft.serve.cut.follow import follow
from weft.serve.cut.ranks import join, start_ranks
from weft.serve.cut.share import check_cut, load_share
from weft.serve.cut.workers import RankDiedError, Workers
from weft.serve.embed import embed
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.kernels.native import find_compiler
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps import compiled
from weft.serve.steps.runner import Runner, num_blocks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]
CONFIG = EngineConfig(max_sequences=4, step_tokens=9, block_tokens=4, cache_tokens=48, device="cpu").on("cpu")
"""Prompts come in parts, and texts are preempted, or give back what is behind their windows."""


def save(model: str, folder: Path) -> Shape:
    """Random weights, far from ties."""
    sizes = {"num_kv_heads": 4} | MODELS[model] | ({"num_kv_heads": 4} if model != "llama" else {})
    shape = Shape(**sizes)
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(folder, shape, torch.float32) as weights:
        for name, dims in stored_sizes(shape).items():
            gain = float("norm" in name and name.endswith("weight"))
            tensor = 0.3 * torch.randn(dims, generator=numbers) + gain
            weights.write(Region.whole(name, dims), tensor)
        weights.sync()
    return shape


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_processes_give_what_one_gives(model: str, tp: int, pp: int, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    _, whole = load_decoder(tmp_path / "model")
    check(whole, complete(whole, PROMPTS, Sampling(max_tokens=18)), replace(CONFIG, tp=tp, pp=pp), tmp_path)


@pytest.mark.parametrize("model", ["llama", "deepseek"])
def test_processes_keep_8_bits_too(model: str, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    _, whole = load_decoder(tmp_path / "model")
    config = replace(CONFIG, cache_dtype="int8")
    check(whole, complete(whole, PROMPTS, Sampling(max_tokens=18), config), replace(config, tp=2, pp=2), tmp_path)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("model", ["gpt2", "qwen3", "deepseek"])
def test_steps_in_fixed_sizes_do_too(
    model: str, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are CUDA graphs on GPUs, on every process its own; here they just run."""
    save(model, tmp_path / "model")
    _, whole = load_decoder(tmp_path / "model")
    config = replace(CONFIG, tp=tp, pp=pp, compile=True)
    monkeypatch.setattr(compiled, "compile_step", lambda model, layers: layers)
    monkeypatch.setattr(Runner, "warm_up", lambda runner: setattr(runner, "decoding", runner.in_fixed_sizes(config)))
    check(whole, complete(whole, PROMPTS, Sampling(max_tokens=18)), config, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(("model", "tp", "pp"), [("gpt2", 2, 2), ("deepseek", 2, 1)])
def test_compiled_processes_do_too(model: str, tp: int, pp: int, tmp_path: Path) -> None:
    warm_compiler()
    save(model, tmp_path / "model")
    _, whole = load_decoder(tmp_path / "model")
    expected = complete(whole, PROMPTS, Sampling(max_tokens=18))
    check(whole, expected, replace(CONFIG, tp=tp, pp=pp, compile=True), tmp_path)


def check(whole: Decoder, expected: list[list[int]], config: EngineConfig, tmp_path: Path) -> None:
    """Serve `tmp_path`/model by the processes of the config: these texts come, and the whole model's embeddings."""
    tp, pp = config.tp, config.pp
    vectors = [embed(Engine(whole, None, CONFIG), prompt) for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 10

    def work(rank: int) -> None:
        ranks = join(tmp_path / "meeting", rank, config)
        share = load_share(tmp_path / "model", ranks)
        if rank:
            blocks = ranks.least(num_blocks(share, config, share.shape.max_seq))
            return follow(Runner(share, blocks, config, ranks), ranks)
        engine = Engine(share, None, config, ranks=ranks)
        assert len(engine.runner.cache.layers) == (whole.shape.num_layers + pp - 1) // pp
        assert all(isinstance(block, compiled.CompiledBlock) for block in share.blocks.values()) == (
            config.compile and engine.runner.decoding is None
        )
        layer = engine.runner.cache.layers[0]
        store = layer.vectors if whole.shape.latent else layer.keys
        rows = (store if config.cache_dtype == "auto" else store.codes).rows
        heads = rows.shape[2] * (1 if whole.shape.latent else tp)
        assert heads == (1 if whole.shape.latent else 4), "heads are dealt out, vectors of latent attention are whole"
        texts: list[list[int]] = [[] for _ in PROMPTS]
        for index, prompt in enumerate(PROMPTS):
            engine.add(Request(str(index), prompt, Sampling(max_tokens=18), prompt_logprobs=1))
        while engine.busy:
            for output in engine.step():
                texts[int(output.id)] += output.tokens
        assert (engine.stats().preemptions > 0) == (whole.shape.sliding_window is None), "windows have room"
        (tmp_path / "texts.json").write_text(json.dumps(texts))
        assert engine.runner.decoding is None or len(engine.runner.decoding.steps) >= 2, "of 1 and of 2 sequences"
        for prompt, vector in zip(PROMPTS, vectors, strict=True):
            assert embed(engine, prompt) == pytest.approx(vector, abs=1e-5)
        engine.close()
        return None

    run_forked(tp * pp, work)
    assert json.loads((tmp_path / "texts.json").read_text()) == expected


def write_adapter(folder: Path, shape: Shape) -> None:
    """Random pairs, for a matrix of every kind of cut, as peft would write them."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    numbers = torch.Generator().manual_seed(1)
    tensors = {}
    for name, place in places(shape).items():
        kinds = ("q.weight", "v.weight", "out.weight", "up.weight", "down.weight")  # latent attention's kv too
        if "blocks" in name and name.endswith(kinds) and len(place.weft_sizes) == 2 and "experts" not in name:
            module = f"base_model.model.{place.tensor.removesuffix('.weight')}"
            out, inner = place.weft_sizes
            tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(3, inner, generator=numbers)
            tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(out, 3, generator=numbers)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("model", ["llama", "deepseek"])
def test_shares_of_adapters_add_up(model: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", save(model, tmp_path / "model"))
    settings = {**CONFIG.__dict__, "adapters": {"one": str(tmp_path / "adapter")}}
    asked = [(str(index), prompt, name) for index, prompt in enumerate(PROMPTS) for name in (None, "one")]

    def texts(engine: Engine) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, prompt, name in asked:
            engine.add(Request(f"{index} {name}", prompt, Sampling(max_tokens=12), adapter=name))
        while engine.busy:
            for output in engine.step():
                found.setdefault(output.id, []).extend(output.tokens)
        return found

    expected = texts(Engine(load_decoder(tmp_path / "model")[1], None, EngineConfig(**settings)))
    assert all(expected[f"{index} None"] != expected[f"{index} one"] for index in range(len(PROMPTS)))

    def work(rank: int) -> None:
        config = EngineConfig(**{**settings, "tp": 2, "pp": 2})
        ranks = join(tmp_path / "meeting", rank, config)
        share = load_share(tmp_path / "model", ranks)
        if rank:
            blocks = ranks.least(num_blocks(share, config, share.shape.max_seq))
            return follow(Runner(share, blocks, config, ranks), ranks)
        engine = Engine(share, None, config, ranks=ranks)
        (tmp_path / "texts.json").write_text(json.dumps(texts(engine)))
        engine.close()
        return None

    run_forked(4, work)
    assert json.loads((tmp_path / "texts.json").read_text()) == expected


def test_heads_that_cannot_be_dealt_out_are_refused(tmp_path: Path) -> None:
    shape = save("llama", tmp_path / "model")
    with pytest.raises(ValueError, match=r"tp is 3, which does not divide the model's num_heads \(8\)"):
        check_cut(shape, 3)
    with pytest.raises(ValueError, match=r"pp is 9, but the model has \d blocks"):
        check_cut(shape, 1, 9)
    with pytest.raises(ValueError, match=r"tp is 8, which does not divide the model's num_kv_heads \(4\)"):
        Engine.load(tmp_path / "model", EngineConfig(tp=8))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise SystemExit(3)", RankDiedError, "process 1 of 2 ended with exit code 3"),
        ("import time; time.sleep(600)", TimeoutError, "not all of 2 processes have begun within 1 s"),
    ],
)
def test_who_never_comes_is_not_waited_for(
    code: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "Workers", lambda codes, env: Workers([code for _ in codes], env))
    monkeypatch.setattr(ranks, "START_SECONDS", 1 if error is TimeoutError else 600)
    with pytest.raises(error, match=words):
        start_ranks(tmp_path, EngineConfig(tp=2, device="cpu"))
