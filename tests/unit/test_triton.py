"""Triton's side of weft without Triton: what requests say, what repositories hold, what is said to whoever is wrong."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder, load_decoder
from weft.cli.app import app
from weft.cli.export_triton import model_name
from weft.cli.triton import start
from weft.export.triton import graph
from weft.export.triton.backends import BACKENDS, GRAPHS, Wanted
from weft.export.triton.pbtxt import Word, pbtxt
from weft.export.triton.repository import export_triton
from weft.models.parameters import stored_sizes
from weft.models.shape import Experts, Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.forms import form_of
from weft.serve.requests.request import Output, RefusedError, Request, Sampling, TokenLogprob
from weft.serve.stats import Stats
from weft.serve.triton import home, keeper, metrics, process, replies, serve
from weft.serve.triton.keeper import EngineKeeper
from weft.serve.triton.replies import FAILED, Replies, values_of
from weft.serve.triton.repository import LOADED, Model, in_ascii, read_repository, without_aoti
from weft.serve.triton.serve import TritonOptions, begin_again, serve_triton
from weft.serve.triton.settings import read_settings, settings_table
from weft.serve.triton.tensors import INPUTS, prompt_of, read_values, sampling_of

SHAPE = Shape(family="llama", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=48, vocab=67, max_seq=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model") / "small", SHAPE)


def model_in(path: Path, shape: Shape) -> Path:
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(path, shape, torch.float32) as weights:
        for name, dims in stored_sizes(shape).items():
            weights.write(Region.whole(name, dims), 0.3 * torch.randn(dims, generator=numbers) + ("norm" in name))
    return path


# -- requests ---------------------------------------------------------------------------------------------------------


def test_tensors_go_before_the_json_table_and_that_before_parameters() -> None:
    values = read_values(
        {"text_input": "a", "max_tokens": 3, "sampling_parameters": '{"max_tokens": 4, "top_k": "5", "stop": "x"}'},
        {"max_tokens": 6, "top_k": 7, "seed": 8, "timeout": 9, "triton_enable_empty_final_response": True},
    )
    assert values == {"text_input": "a", "max_tokens": 3, "top_k": 5, "stop": ["x"], "seed": 8}
    assert sampling_of(values, (2,)) == Sampling(max_tokens=3, top_k=5, stop=("x",), seed=8, eos=(2,))
    assert sampling_of({"top_k": -1, "stop_token_ids": [4]}, ()) == Sampling(stop_ids=(4,))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": 3, "m": 1}, "m, tokens: unknown; a request may have text_input"),
        ({"max_tokens": "many"}, "max_tokens is 'many'; it must be a whole number"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True; it must be a whole number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"stream": 1}, "stream is 1; it must be true or false"),
        ({"stop": [1]}, "stop is 1; it must be a text"),
        ({"sampling_parameters": "{"}, "sampling_parameters is not JSON"),
        ({"sampling_parameters": "[]"}, "sampling_parameters must be a JSON table"),
        ({"sampling_parameters": 3}, "sampling_parameters is not JSON"),
    ],
)
def test_what_a_request_may_not_say(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read_values({}, values)


def test_a_prompt_is_a_text_or_ids_and_has_one_form_at_most(folder: Path) -> None:
    with pytest.raises(ValueError, match="text_input needs a tokenizer, and the model's folder has none"):
        prompt_of({"text_input": "a"}, None)
    for values in ({}, {"text_input": "a", "input_ids": [1]}):
        with pytest.raises(ValueError, match="give the prompt as text_input, or as input_ids"):
            prompt_of(values, None)
    assert prompt_of({"input_ids": [1]}, None) == [1]
    assert form_of({"regex": "a+"}) == ("regex", "a+")
    assert form_of({"n": 1}) is None
    assert form_of({"lark": 'start: "a"'}) == ("lark", 'start: "a"')
    with pytest.raises(ValueError, match="json_schema and lark: a text has one form; leave all but one of them out"):
        form_of({"lark": "a", "json_schema": "{}"})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
names = st.sampled_from([*(tensor.name for tensor in INPUTS), "timeout", "other"])


@given(st.dictionaries(names, scalars | st.lists(scalars)), st.dictionaries(names, scalars))
def test_whatever_is_asked_is_read_or_refused(parameters: dict[str, Any], table: dict[str, Any]) -> None:
    with suppress(ValueError):
        values = read_values({}, {**parameters, "sampling_parameters": json.dumps(table)})
        assert isinstance(sampling_of(values, ()), Sampling)


# -- answers ----------------------------------------------------------------------------------------------------------


class Told:
    """A sender that remembers, as slowly as it is told to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.said, self.gone = seconds, [], False
        self.ended = threading.Event()

    def send(self, outputs: list[Output], last: bool) -> None:
        time.sleep(self.seconds)
        self.said.append([token for output in outputs for token in output.tokens])
        if last:
            self.ended.set()

    def fail(self, kind: str, why: str) -> None:
        self.said.append((kind, why))
        self.ended.set()

    def cancelled(self) -> bool:
        assert not self.ended.is_set()  # Triton has forgotten the request by then
        return self.gone


@pytest.mark.parametrize("stream", [True, False])
def test_what_piles_up_goes_out_together_and_in_order(stream: bool) -> None:
    answers, told = Replies(lambda id: None), Told(seconds=0.02)
    reply = answers.make("a", told, stream)
    answers.watch(reply)
    for token in range(50):
        reply.deliver(Output("a", tokens=(token,), finish="length" if token == 49 else None))
    assert told.ended.wait(10)
    answers.close()
    assert [token for some in told.said for token in some] == list(range(50))
    assert len(told.said) < 25 if stream else len(told.said) == 1


def test_a_request_that_ended_before_it_was_watched_is_forgotten() -> None:
    answers, told = Replies(lambda id: None), Told()
    reply = answers.make("a", told, True)
    reply.deliver(Output("a", tokens=(1,), finish="stop"))
    assert told.ended.wait(10)
    answers.watch(reply)
    time.sleep(2.5 * replies.ASK_SECONDS)
    answers.close()
    assert told.said == [[1]]


@pytest.mark.parametrize(
    ("finish", "error", "said"),
    [
        ("cancelled", None, ("CANCELLED", "the request was cancelled")),
        ("error", "the engine failed: OSError: /secret", ("INTERNAL", FAILED)),
        ("error", "not finite", ("INTERNAL", "not finite")),
    ],
)
def test_ends_that_are_errors(finish: Any, error: str | None, said: tuple[str, str]) -> None:
    answers, told = Replies(lambda id: None), Told()
    reply = answers.make("a", told, False)
    answers.watch(reply)
    reply.deliver(Output("a", finish=finish, error=error))
    assert told.ended.wait(10)
    answers.close()
    assert told.said == [said]


def test_whoever_has_gone_is_cancelled() -> None:
    cancelled: list[str] = []
    answers, told = Replies(cancelled.append), Told()
    answers.watch(answers.make("a", told, False))
    told.gone = True
    limit = time.monotonic() + 10
    while not cancelled and time.monotonic() < limit:
        time.sleep(0.01)
    answers.close()
    assert set(cancelled) == {"a"}


def test_values_of_outputs() -> None:
    outputs = [Output("a", tokens=(1, 2), text="x"), Output("a", tokens=(3,), text="y", finish="stop")]
    whole = {"text_output": ["xy"], "output_ids": [1, 2, 3], "finish_reason": ["stop"]}
    assert values_of(outputs, False, [None]) == whole
    assert values_of(outputs[:1], True, [None]) == {"text_output": ["x"], "output_ids": [1, 2], "logprobs": []}
    told = replace(outputs[0], prompt_logprobs=(None, TokenLogprob(5, -1.5), TokenLogprob(6, -0.5)))
    assert values_of([told, outputs[1]], False, [None]) == {**whole, "prompt_logprobs": [-1.5, -0.5]}


def test_values_of_several_completions() -> None:
    ends: list[str | None] = [None, None]
    first = [Output("a", 1, (1, 2), "x", finish="stop"), Output("a", 0, (3,), "y")]
    assert values_of(first, False, ends) == {"text_output": ["y", "x"], "output_ids": [3, 1, 2], "lengths": [1, 2]}
    last = [Output("a", 0, (4,), "z", finish="length")]
    assert values_of(last, False, ends) == {
        "text_output": ["z", ""], "output_ids": [4], "lengths": [1, 0], "finish_reason": ["length", "stop"]
    }  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_with_its_last_completion(stream: bool) -> None:
    answers, told = Replies(lambda id: None), Told()
    reply = answers.make("a", told, stream, n=3)
    answers.watch(reply)
    for index in (2, 0, 1):
        reply.deliver(Output("a", index, (index,), finish="stop"))
        time.sleep(0.02)
        assert told.ended.is_set() == (index == 1)
    answers.close()
    assert [token for some in told.said for token in some] == [2, 0, 1]
    assert len(told.said) == (3 if stream else 1)


def test_a_completion_that_fails_ends_its_request() -> None:
    cancelled: list[str] = []
    answers, told = Replies(cancelled.append), Told()
    reply = answers.make("a", told, True, n=2)
    answers.watch(reply)
    reply.deliver(Output("a", 1, finish="error", error="not finite"))
    assert told.ended.wait(10)
    reply.deliver(Output("a", 0, (1,), finish="cancelled"))
    answers.close()
    assert (told.said, cancelled) == ([("INTERNAL", "not finite")], ["a"])


# -- the engine -------------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(keeper, "FIRST_PAUSE", 0.01)
    engines: list[Engine] = []

    def build() -> Engine:
        if len(engines) == 1:
            engines.append(engines[0])
            raise OSError("no memory")
        engines.append(Engine(load_decoder(folder)[1]))
        return engines[-1]

    kept = EngineKeeper(build)

    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engines[0], "step", fail)
    ends: list[Output] = []
    kept.submit(Request("a", [1]), ends.append)
    limit = time.monotonic() + 20
    while not ends:
        time.sleep(0.001)
    with pytest.raises(RefusedError, match="the engine failed and is being started again"):
        kept.submit(Request("b", [1, 2]), ends.append)
    while kept._loop is None or kept._loop.error is not None:
        time.sleep(0.01)
    kept.submit(Request("b", [1, 2], Sampling(max_tokens=3)), ends.append)
    while len(ends) < 4 and time.monotonic() < limit:
        time.sleep(0.01)
    kept.close()
    assert [(end.id, end.finish) for end in ends] == [("a", "error"), ("b", None), ("b", None), ("b", "length")]
    said = capsys.readouterr().err
    assert "the engine failed and is started again: broken" in said
    assert "the engine did not start: no memory" in said


# -- repositories -----------------------------------------------------------------------------------------------------


def parsed(file: Path) -> Any:
    return text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in GRAPHS])
def test_a_repository_is_what_triton_reads(backend: str, folder: Path, tmp_path: Path) -> None:
    made = export_triton(folder, tmp_path / "models", "small", backend, tp=2, dtype=torch.bfloat16)
    config, version = parsed(made / "config.pbtxt"), made / "1"
    assert config.name == "small"
    assert load_decoder(version / "weights")[1].head.weight.dtype == torch.bfloat16
    assert f"now 2" in " ".join((made / "README.md").read_text().split())  # noqa: F541
    for line in (made / "README.md").read_text().split("```")[1::2]:
        shlex.split(line, comments=True)  # commands that a shell can read
    [model] = read_repository(tmp_path / "models")
    assert model == Model("small", config.backend, backend == "weft")
    kind = config.instance_group[0].kind
    if backend == "weft":
        assert read_settings(version) == (version / "weights", EngineConfig(tp=2))
        assert config.model_transaction_policy.decoupled
        assert [one.name for one in config.input] == [tensor.name for tensor in INPUTS]
        assert kind == model_config_pb2.ModelInstanceGroup.KIND_MODEL
    elif backend == "vllm":
        settings = json.loads((version / "model.json").read_text())
        assert settings["model"] == str(version / "weights")
        assert (settings["tensor_parallel_size"], settings["max_model_len"]) == (2, 64)
        assert settings["dtype"] == "bfloat16"
        assert config.backend == "vllm"
        assert kind == model_config_pb2.ModelInstanceGroup.KIND_MODEL
    else:
        yaml = pytest.importorskip("yaml")
        settings = yaml.safe_load((version / "model.yaml").read_text())
        assert settings["model"] == str(version / "weights")
        assert (settings["backend"], settings["tensor_parallel_size"]) == ("pytorch", 2)
        assert settings["triton_config"] == {"max_batch_size": 0, "decoupled": True}
        assert {"text_input", "streaming", "sampling_param_max_tokens"} < {one.name for one in config.input}
        assert kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def adapter_in(folder: Path, shape: Shape, rank: int) -> Path:
    """For one matrix of the second block."""
    where, name = folder / f"rank-{rank}", "base_model.model.model.layers.1.self_attn.o_proj"
    where.mkdir(parents=True)
    pair = {
        f"{name}.lora_A.weight": torch.zeros(rank, shape.hidden),
        f"{name}.lora_B.weight": torch.ones(shape.hidden, rank),
    }
    save_file(pair, where / "adapter_model.safetensors")
    (where / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return where


def test_vllm_is_told_the_dtype_and_the_adapters(folder: Path, tmp_path: Path) -> None:
    """The dtype is the weights': vLLM's own choice would be another."""
    adapters = {f"rank{rank}": adapter_in(tmp_path, SHAPE, rank) for rank in (3, 9)}
    made = export_triton(folder, tmp_path / "models", "small", "vllm", adapters=adapters)
    settings, lora = (json.loads((made / "1" / name).read_text()) for name in ("model.json", "multi_lora.json"))
    assert settings["dtype"] == "float32"
    assert [settings[name] for name in ("enable_lora", "max_loras", "max_lora_rank")] == [True, 2, 16]
    assert lora.keys() == adapters.keys()
    for name, where in lora.items():
        copied, source = (Path(one) / "adapter_model.safetensors" for one in (where, adapters[name]))
        assert copied.read_bytes() == source.read_bytes()
    assert "`lora_name`: rank3, rank9" in (made / "README.md").read_text()
    with pytest.raises(ValueError, match="--adapter: rank 513 is more than vLLM takes, 512"):
        export_triton(folder, tmp_path / "models", "other", "vllm", adapters={"a": adapter_in(tmp_path, SHAPE, 513)})


@pytest.mark.parametrize("backend", ["vllm", "tensorrtllm"])
def test_a_folder_that_the_backends_python_could_not_open(backend: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"möbel: the Python in Triton that runs {backend} opens only paths in ASCII"):
        export_triton(folder, tmp_path / "möbel", "small", backend)
    assert not (tmp_path / "möbel").exists()


def test_vllm_has_no_adapters_for_gpt2(tmp_path: Path) -> None:
    wanted = Wanted("small", tmp_path, SHAPE.model_copy(update={"family": "gpt2"}), 1, adapters={"a": 1})
    with pytest.raises(ValueError, match="--adapter: vLLM has none for GPT-2"):
        BACKENDS["vllm"](wanted)


@pytest.mark.slow
def test_a_graph_is_the_model(tmp_path: Path) -> None:
    """AOTInductor's takes a minute to make: that one is looked at where Triton serves it, in tests/system."""
    import onnxruntime

    folder = model_in(tmp_path / "one-layer", SHAPE.model_copy(update={"num_layers": 1, **QWEN}))
    made = export_triton(folder, tmp_path / "models", "small", "onnxruntime")
    config = parsed(made / "config.pbtxt")
    assert list(config.output[0].dims)[-1] == 67
    module = graph.Logits(load_decoder(folder)[1].eval())
    session = onnxruntime.InferenceSession(made / "1/model.onnx/model.onnx")
    assert [one.name for one in session.get_inputs()] == [config.input[0].name]
    assert [one.name for one in session.get_outputs()] == [config.output[0].name]
    run = lambda tokens: torch.from_numpy(session.run(None, {"input_ids": tokens.numpy()})[0])  # noqa: E731
    for tokens in (UNREADABLE, torch.ones(1, 64, dtype=torch.long), torch.ones(2, 65, dtype=torch.long)):
        assert torch.allclose(run(tokens), module(tokens), atol=1e-5, equal_nan=True)
    module.model.head.weight.data[3] += 0.1  # another model: the comparison sees it
    assert graph.compare(module, run) > 1e-3


QWEN = {"family": "qwen3", "qk_norm": True}
UNREADABLE = torch.tensor([[5, 67, 1], [1, 2, 3], [-1, 2, 3]])


def test_a_text_that_cannot_be_read_is_nan_and_the_others_are_not() -> None:
    """NVIDIA's backends look at no token: what goes wrong in a graph goes wrong for all that are in the batch."""
    module = graph.Logits(load_like(SHAPE))
    logits = module(UNREADABLE)
    assert logits[[0, 2]].isnan().all()
    assert torch.allclose(logits[1], load_like(SHAPE)(UNREADABLE[1:2])[0], atol=1e-5)
    assert not module(torch.ones(1, 64, dtype=torch.long)).isnan().any()
    long = module(torch.ones(1, 10**6, dtype=torch.long))
    assert long.shape == (1, 64, 67)  # and memory for no more
    assert long.isnan().all()


def test_a_graph_without_proof_is_removed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.WRITERS, "aoti", lambda module, version: lambda tokens: module(tokens) * 1.001)
    with pytest.raises(ValueError, match=r"the export is wrong: aoti's logits differ from the model's by 1\.0e-03"):
        export_triton(folder, tmp_path, "small", "aoti")
    with pytest.raises(
        ValueError, match="ONNX Runtime has no bf16 on a CPU, where the graph is proved: choose --dtype"
    ):
        export_triton(folder, tmp_path, "small", "onnxruntime", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("no", name="onnxscript"), r"onnxruntime needs onnxscript: pip install 'weft\[onnx\]'"),
        (RuntimeError("an op\nthat is long"), "torch cannot export this model: RuntimeError: an op"),
    ],
)
def test_what_an_exporter_cannot(
    error: Exception, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: object, version: object) -> None:
        raise error

    monkeypatch.setitem(graph.WRITERS, "onnxruntime", fail)
    with pytest.raises(ValueError, match=said):
        export_triton(folder, tmp_path, "small", "onnxruntime")


@pytest.mark.parametrize("backend", GRAPHS)
def test_a_graph_has_no_experts_to_choose(backend: str, tmp_path: Path) -> None:
    mixture = SHAPE.model_copy(update={"family": "mixtral", "experts": Experts(num_experts=4, per_token=2, ffn=48)})
    folder = model_in(tmp_path / "mixture", mixture)
    with pytest.raises(ValueError, match=f"--backend {backend} runs a graph, where a token cannot choose its experts"):
        export_triton(folder, tmp_path / "models", "small", backend)
    assert not (tmp_path / "models").exists()


def test_the_masks_are_those_of_the_model() -> None:
    for window in (None, 3):
        shape = SHAPE.model_copy(update={"sliding_window": window, "family": "mistral" if window else "llama"})
        module = graph.Logits(load_like(shape))
        tokens = torch.randint(67, (2, 9))
        wants = load_like(shape)(tokens)
        assert torch.allclose(module(tokens), wants, atol=1e-5)


def load_like(shape: Shape) -> Any:
    from weft.models.decoder import Decoder

    torch.manual_seed(1)
    return Decoder(shape).requires_grad_(False)


def test_weights_can_stay_where_they_are(folder: Path, tmp_path: Path) -> None:
    made = export_triton(folder, tmp_path, "small", link=True)
    assert (made / "1/weights").resolve() == folder.resolve()
    export_triton(folder, tmp_path, "second", link=True)  # beside another model
    assert [model.name for model in read_repository(tmp_path)] == ["second", "small"]


@pytest.mark.parametrize("backend", ["weft", "vllm", "tensorrtllm"])
def test_a_container_sees_weights_that_stayed_where_they_are(backend: str, folder: Path, tmp_path: Path) -> None:
    """Or the link of the repository leads nowhere in there."""
    pages = [
        (export_triton(folder, tmp_path, f"link-{link}", backend, link=link) / "README.md").read_text()
        for link in (False, True)
    ]
    source = f"{folder.resolve()}:{folder.resolve()}:ro"
    volume = f"-v {tmp_path}:{tmp_path} -v {source} "
    assert [volume in page for page in pages] == [False, True]
    assert [source in page for page in pages] == [False, True]
    if backend != "weft":  # whose Slurm command runs in no container
        assert f"--container-mounts={tmp_path},{source} " in pages[1]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"backend": "tf"}, "--backend tf: choose weft, vllm, tensorrtllm, onnxruntime, aoti"),
        ({"name": "a b"}, "--name 'a b' cannot be a model's name in Triton"),
        ({"tp": 3}, "tp is 3, which does not divide the model's num_heads"),
        ({"link": True, "dtype": torch.bfloat16}, "--link leaves the weights as they are"),
        ({"adapters": {"a/b": Path()}}, "--adapter 'a/b' cannot be an adapter's name"),
        (
            {"adapters": {"a": Path()}, "backend": "aoti"},
            "--adapter is for weft and vllm: leave it out with --backend aoti",
        ),
        ({"adapters": {"a": Path("nowhere")}}, "adapter_config.json"),
        ({"backend": "aoti", "tp": 2}, "--backend aoti has the weights in its graph, whole"),
    ],
)
def test_what_cannot_be_exported(over: dict[str, Any], said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        export_triton(folder, tmp_path / "models", **{"name": "small", **over})
    assert not (tmp_path / "models").exists()


def test_nothing_is_overwritten_and_nothing_left(folder: Path, tmp_path: Path) -> None:
    export_triton(folder, tmp_path, "small", link=True)
    with pytest.raises(ValueError, match="small exists: choose another --name"):
        export_triton(folder, tmp_path, "small")
    (tmp_path / "other.tmp").mkdir()
    with pytest.raises(ValueError, match=r"other\.tmp exists, perhaps of an export that was killed"):
        export_triton(folder, tmp_path, "other")
    gpt2 = model_in(
        tmp_path / "gpt2", Shape(family="gpt2", num_layers=1, hidden=8, num_heads=2, ffn=8, vocab=9, max_seq=8)
    )
    with pytest.raises(ValueError, match="TensorRT-LLM has no GPT-2"):
        export_triton(gpt2, tmp_path, "third", "tensorrtllm")
    file = gpt2 / "config.json"
    for where in (file, file / "models", Path("/proc/models")):
        with pytest.raises(ValueError, match=f"{where} cannot be made a folder"):
            export_triton(folder, where, "fourth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "other.tmp", "small"]


def test_command(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "triton", str(folder), "--out", str(tmp_path), "--link", "--tp", "2"])
    assert result.exit_code == 0, result.output
    assert "model 'small' for Triton, backend weft; weights linked" in " ".join(result.output.split())
    assert "weft serve-triton" in result.output
    assert read_settings(tmp_path / "small/1")[1].tp == 2
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "copy")])  # huggingface, as ever
    assert "proved: read back" in result.output, result.output


def test_names() -> None:
    names = {"runs/a b": "a-b", "runs/x/checkpoints/step-00000010": "x", "runs/x/checkpoints/step-1/model": "x"}
    assert {path: model_name(Path("/") / path) for path in names} == names
    assert model_name(Path("/model")) == "model"


def test_config_text() -> None:
    text = pbtxt({"name": 'a "b" é', "kind": Word("KIND_CPU"), "list": [1, -1], "inner": {"deep": [{"x": True}, {}]}})
    assert text == (
        'name: "a \\"b\\" \\u00e9"\nkind: KIND_CPU\nlist: [ 1, -1 ]\ninner {\n  deep: [\n    {\n      x: true\n    },\n'
        "    {\n    }\n  ]\n}\n"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tpp": 2}, "tpp: unknown; settings are weights, max_sequences"),
        ({"tp": "2"}, "tp is '2'; it must be int"),
        ({"tp": True}, "tp is True; it must be int"),
        ({"tp": 0}, "model.json: tp is 0; it must be at least 1"),
        ({"adapters": []}, "adapters is []; it must be dict"),
        ({"adapters": {"a": "nowhere"}}, "adapters: a is 'nowhere'; it must be an adapter's folder"),
        ({"adapters": {"a": 3}}, "adapters: a is 3; it must be an adapter's folder"),
        ({"cache_tokens": "x"}, "cache_tokens is 'x'; it must be int or None"),
        ({"weights": "elsewhere"}, "elsewhere is not there: export the model again"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], said: str, folder: Path, tmp_path: Path) -> None:
    file = export_triton(folder, tmp_path, "small", link=True) / "1/model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(said)):
        serve_triton(tmp_path)


def test_settings_are_all_of_the_engines() -> None:
    table = settings_table(EngineConfig(gpu_share=1))
    assert table["gpu_share"] == 1
    assert table["cache_bytes"] is None


def test_what_an_old_triton_refuses_is_left_out_of_configs(folder: Path, tmp_path: Path) -> None:
    repository, empty = tmp_path / "models", tmp_path / "empty"
    export_triton(folder, repository, "small", link=True)
    empty.mkdir()
    assert without_aoti(repository, empty) == repository
    compiled = repository / "compiled"
    (compiled / "1").mkdir(parents=True)
    (compiled / "1/model.pt2").touch()
    (compiled / "config.pbtxt").write_text(pbtxt(BACKENDS["aoti"](Wanted("compiled", compiled, SHAPE, 1)).config))
    assert without_aoti(repository, empty) == empty
    assert [one.name for one in read_repository(empty)] == ["compiled", "small"]
    before, after = (parsed(where / "compiled/config.pbtxt") for where in (repository, empty))
    assert (before.platform, after.platform) == ("torch_aoti", "")
    before.platform = ""
    assert after == before
    assert (empty / "compiled/1/model.pt2").is_file()
    assert read_settings(empty / "small/1")[0].is_dir()


def test_a_path_that_is_not_ascii_is_seen_through_a_link(tmp_path: Path) -> None:
    plain, other, link = tmp_path / "models", tmp_path / "möbel", tmp_path / "link"
    other.mkdir()
    assert in_ascii(plain, link) == plain
    assert not link.exists()
    assert in_ascii(other, link) == link
    assert link.resolve() == other


# -- Triton -----------------------------------------------------------------------------------------------------------


def test_repositories_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        serve_triton(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is no repository of Triton's: no folder in it has a config\.pbtxt"):
        serve_triton(tmp_path)
    export_triton(folder, tmp_path, "small", "vllm", link=True)
    with pytest.raises(ValueError, match="the Triton that pip brings has no backend 'vllm', only python, and weft"):
        serve_triton(tmp_path)
    (tmp_path / "small/config.pbtxt").write_text('backend: "pytorch"\nplatform: "pytorch_libtorch"')
    with pytest.raises(ValueError, match=r"no backend 'pytorch', only python, .* and pytorch for a model\.pt2"):
        serve_triton(tmp_path)
    with pytest.raises(ValueError, match="holds no Triton: it needs bin/tritonserver and backends/"):
        serve_triton(tmp_path, TritonOptions(http=0, grpc=0, metrics=0, triton=tmp_path))


def test_a_port_that_is_taken_is_told_before_triton_is_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_triton(folder, tmp_path, "small", link=True)
    monkeypatch.setattr("weft.serve.triton.serve.find_home", lambda triton: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for ports, name in (((port, 0, 0), "http"), ((0, port, 0), "grpc")):
            with pytest.raises(
                ValueError, match=f"--{name}-port: cannot listen on 127.0.0.1:{port}: .*; 0 takes a free"
            ):
                serve_triton(tmp_path, TritonOptions("127.0.0.1", *ports))
    with pytest.raises(ValueError, match=f"--metrics-port: cannot listen on 127.0.0.1:{port}"):
        serve_triton(tmp_path, TritonOptions("127.0.0.1", port, 0, port))


def test_the_command_says_that_it_has_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_triton(folder, tmp_path, "small", link=True)
    monkeypatch.setattr("weft.serve.triton.serve.serve_triton", lambda *arguments: None)
    start(tmp_path, TritonOptions())
    assert capsys.readouterr().out == "stopped\n"


def test_a_graph_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graph/1").mkdir(parents=True)
    (tmp_path / "graph/config.pbtxt").write_text('backend: "onnxruntime"')
    monkeypatch.setattr("weft.serve.triton.serve.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"graph needs ONNX Runtime: pip install 'weft\[onnx\]'"):
        serve_triton(tmp_path)


def test_triton_that_does_not_come_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_triton(tmp_path / "triton", "exit 3")
    export_triton(folder, tmp_path / "models", "small", link=True)
    options = TritonOptions(http=0, grpc=0, metrics=0, triton=made, start_seconds=2)
    with pytest.raises(ValueError, match="Triton ended with exit code 3 before it was ready: its own words are above"):
        serve_triton(tmp_path / "models", options)
    (made / "bin/tritonserver").write_text("#!/bin/sh\nexec sleep 100\n")
    with pytest.raises(ValueError, match=r"Triton is not ready after 2 s: http://127\.0\.0\.1:\d+ does not answer"):
        serve_triton(tmp_path / "models", options)


def fake_triton(folder: Path, script: str) -> Path:
    """A Triton that is a shell script."""
    (folder / "bin").mkdir(parents=True)
    (folder / "backends").mkdir()
    server = folder / "bin/tritonserver"
    server.write_text(f"#!/bin/sh\n{script}\n")
    server.chmod(0o755)
    return folder


def test_a_triton_that_lost_its_models_is_begun_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(process, "LOST_SECONDS", 0.2)
    monkeypatch.setattr(serve, "PAUSES", (0.0, 0.0))
    made = fake_triton(tmp_path / "triton", f'touch "${LOADED}/small"; exec sleep 100')
    export_triton(folder, tmp_path / "models", "small", link=True)
    options = TritonOptions(http=0, grpc=0, metrics=0, triton=made)
    with pytest.raises(
        ValueError, match="does not come up again after 2 tries; last: Triton lost touch with its models"
    ):
        serve_triton(tmp_path / "models", options)
    assert capsys.readouterr().err.count("Triton lost touch with its models while they loaded") == 3

    def answer(self: object, method: str, path: str, body: object = None) -> tuple[int, str]:
        return (200, "") if "health" in path else (400, "output tensor shape does not match")

    monkeypatch.setattr(process.TritonProcess, "_ask", answer)
    with pytest.raises(ValueError, match=r"do not answer as they should: small says 400 .* reads numpy 1 alone"):
        serve_triton(tmp_path / "models", options)


def test_a_triton_that_crashes_is_begun_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(serve, "PAUSES", (0.0, 0.0))
    made = fake_triton(tmp_path / "triton", "kill -ABRT $$")
    export_triton(folder, tmp_path / "models", "small", link=True)
    options = TritonOptions(http=0, grpc=0, metrics=0, triton=made)
    with pytest.raises(ValueError, match="after 2 tries; last: Triton ended with exit code -6 before it was ready"):
        serve_triton(tmp_path / "models", options)
    assert capsys.readouterr().err.count("exit code -6") == 3


def test_triton_ends_with_its_starter(folder: Path, tmp_path: Path) -> None:
    made = fake_triton(
        tmp_path / "triton", f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 100"
    )
    export_triton(folder, tmp_path / "models", "small", link=True)
    command = [sys.executable, "-m", "weft", "serve-triton", str(tmp_path / "models"), "--triton", str(made)]
    starter = subprocess.Popen([*command, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"])
    limit = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    starter.kill()
    starter.wait()
    pid = (tmp_path / "pid").read_text().strip()
    while Path("/proc", pid).exists():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_metrics_tell_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TELL_SECONDS", 0.0)
    said: list[tuple[str, str, str, float]] = []

    class Metric:
        def __init__(self, name: str, labels: dict[str, str]) -> None:
            self.name, self.reason = name, labels.get("finished_reason", "")
            assert labels["model"] == "small"

        def set(self, value: float) -> None:
            said.append((self.name, self.reason, "set", value))

        def increment(self, value: float) -> None:
            said.append((self.name, self.reason, "add", value))

    class MetricFamily:
        GAUGE, COUNTER = "gauge", "counter"

        def __init__(self, name: str, description: str, kind: str) -> None:
            self.name = name
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            assert description

        def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 (Triton's name)
            return Metric(self.name, labels)

    class Utils:
        pass

    Utils.MetricFamily = MetricFamily  # type: ignore[attr-defined]
    told = metrics.Metrics(Utils, {"model": "small"})
    stats = Stats(
        running=2, waiting=0, cache_tokens=64, block_tokens=16, cache_used=0.5, steps=3, prompt_tokens=10,
        cached_tokens=4, new_tokens=7, preemptions=0, drafted=0, accepted=0, finished={"stop": 1},
    )  # fmt: skip
    told.tell(lambda: None)
    told.tell(lambda: stats)
    assert ("vllm:num_requests_running", "", "set", 2.0) in said
    assert ("vllm:generation_tokens_total", "", "add", 7.0) in said
    assert ("vllm:request_success_total", "stop", "add", 1.0) in said
    said.clear()
    told.tell(lambda: replace(stats, new_tokens=9))
    told.tell(lambda: replace(stats, new_tokens=1))  # an engine that was built anew
    assert said == [("vllm:generation_tokens_total", "", "add", value) for value in (2.0, 1.0)]


def test_it_is_tried_several_times_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(serve, "PAUSES", (0.0, 0.01, 0.01))
    tries: list[int] = []

    def begin() -> Any:
        tries.append(len(tries))
        if len(tries) < wins:
            raise ValueError(f"failure {len(tries)}")
        return "up"

    wins = 3
    assert begin_again(begin, threading.Event()) == "up"
    tries, wins = [], 9
    with pytest.raises(ValueError, match="Triton does not come up again after 3 tries; last: failure 3"):
        begin_again(begin, threading.Event())
    assert "failure 2" in capsys.readouterr().err


def test_the_stubs_python_sees_through_and_reads_utf8(tmp_path: Path) -> None:
    """As the stub has it: isolated, with no locale; then a path is bytes, and a text ASCII."""
    site, outer, more = (tmp_path / name for name in ("site", "möbel", "stühle"))
    for folder, module in ((site, None), (outer, "inside"), (more, "further")):
        folder.mkdir()
        if module is not None:
            (folder / f"{module}.py").touch()
    (tmp_path / "text").write_text("ö", encoding="utf-8")
    home.see_through(site, str(outer))
    asked = (
        f"import site, sys; assert sys.getfilesystemencoding() == 'ascii'; site.addsitedir({str(site)!r}); "
        f"import inside, further; print(ascii(open({str(tmp_path / 'text')!r}).read()))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-X", "utf8=0", "-c", asked], capture_output=True, text=True, check=False,
        env={"LC_ALL": "C", "PYTHONPATH": str(more)},
    )  # fmt: skip
    assert done.stdout == ascii("ö") + "\n", done.stderr


def test_what_keeps_triton_from_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(home, "PACKAGES", ("./not-there.whl",))
    with pytest.raises(ValueError, match=r"Triton could not be installed: (.|\n)*not-there") as error:
        home.find_home()
    assert "elsewhere use NVIDIA's container" in str(error.value)
    assert "once (73 MB)" in capsys.readouterr().err
    assert list((tmp_path / "weft").iterdir()) == []
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: {"LIBDIR": str(tmp_path)}.get(name))
    with pytest.raises(ValueError, match=r"needs the shared library of .* and there is none in"):
        home.find_home()
