"""KServe v2 as its clients speak it: tritonclient over both protocols, curl, and strangers."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from profiled import TOKENS, analyze, needs_perf_analyzer
from served import engine_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tritonclient.utils import InferenceServerException

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder, load_decoder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.generate import complete
from weft.serve.requests.request import Sampling
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ModelConfig, ServerConfig
from weft.serve.server.kserve.rpc import start_grpc
from weft.serve.server.kserve.schema import MESSAGES
from weft.serve.server.limits import Limits

LETTERS = string.ascii_letters + string.digits + "Ġ"
SHAPE = Shape(
    family="llama", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=48, vocab=len(LETTERS), max_seq=4096
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are letters."""
    path = tmp_path_factory.mktemp("served") / "model"
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(path, SHAPE, torch.float32) as weights:
        for name, dims in stored_sizes(SHAPE).items():
            weights.write(Region.whole(name, dims), 0.3 * torch.randn(dims, generator=numbers) + ("norm" in name))
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str, int], tuple[list[int], str]]:
    """What the model says, without any server."""
    _, model = load_decoder(folder)

    def say(prompt: str, count: int) -> tuple[list[int], str]:
        [ids] = complete(model, [[LETTERS.index(letter) for letter in prompt]], Sampling(max_tokens=count))
        return ids, "".join(LETTERS[id] for id in ids).replace("Ġ", " ")

    return say


@dataclass(frozen=True)
class Server:
    http: str
    grpc: str

    def metric(self, line: str) -> float:
        """The value of a line of /metrics that begins so."""
        text = httpx.get(f"http://{self.http}/metrics").text
        [value] = re.findall(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def canceled(self) -> float:
        return self.metric('nv_inference_request_failure{model="small",reason="CANCELED",version="1"}')

    def running(self) -> float:
        return self.metric('vllm:num_requests_running{model_name="small"}')


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "weft", "serve", f"small={folder}", "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = ""
    while not (found := re.search(r"KServe +http://(\S+)/v2 .* gRPC at (\S+)\n", said)):
        line = process.stdout.readline()
        assert line, f"the server ended: {process.communicate()}"
        said += line
    yield Server(found[1], found[2])
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert not errors  # nothing that went wrong in a test was news to the server


def inputs(module: Any, prompt: str, **settings: Any) -> list[Any]:
    """tritonclient's inputs, of the HTTP or the gRPC module."""
    arrays = {"text_input": np.array([prompt.encode()], dtype=object)}
    kinds: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32}
    arrays |= {name: np.array([value], kinds[type(value)]) for name, value in settings.items()}
    names = {"O": "BYTES", "b": "BOOL", "i": "INT32", "f": "FP32"}
    found = []
    for name, array in arrays.items():
        found.append(module.InferInput(name, list(array.shape), names[array.dtype.kind]))
        found[-1].set_data_from_numpy(array)
    return found


def ids_of(result: Any) -> list[int]:
    return [int(id) for id in result.as_numpy("output_ids")]


Expected = Callable[[str, int], tuple[list[int], str]]


# -- tritonclient -----------------------------------------------------------------------------------------------------


def test_tritonclient_over_http(server: Server, expected: Expected) -> None:
    ids, text = expected("Hello", 6)
    with triton_http.InferenceServerClient(server.http) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small")
        assert client.is_model_ready("small", "1")
        assert not client.is_model_ready("small", "2")
        assert not client.is_model_ready("large")
        assert client.get_server_metadata()["name"] == "weft"
        assert client.get_model_metadata("small", "1")["inputs"][0]["name"] == "text_input"
        assert client.get_model_config("small")["max_batch_size"] == 0
        assert client.get_model_repository_index() == [
            {"name": "small", "version": "1", "state": "READY", "reason": ""}
        ]
        asked = inputs(triton_http, "Hello", max_tokens=6, logprobs=2)
        result = client.infer("small", asked, request_id="a", model_version="1")
        assert ids_of(result) == ids
        assert result.as_numpy("text_output").tolist() == [text.encode()]
        assert result.as_numpy("finish_reason").tolist() == [b"length"]
        assert result.as_numpy("top_ids")[:, 0].tolist() == ids  # the most probable one is the one that greed takes
        assert np.allclose(result.as_numpy("top_logprobs")[:, 0], result.as_numpy("logprobs"))
        assert (result.get_response()["id"], result.get_response()["model_version"]) == ("a", "1")
        outputs = [triton_http.InferRequestedOutput("text_output", binary_data=False)]
        for packing in (None, "gzip", "deflate"):
            result = client.infer("small", asked, outputs=outputs, request_compression_algorithm=packing)
            assert [one["data"] for one in result.get_response()["outputs"]] == [[text]]
        waiting = [client.async_infer("small", inputs(triton_http, "Hello", max_tokens=6)) for _ in range(3)]
        assert [ids_of(one.get_result()) for one in waiting] == [ids] * 3
        before = client.get_inference_statistics("small")["model_stats"][0]
        client.infer("small", asked)
        after = client.get_inference_statistics()["model_stats"][0]
        assert after["inference_count"] == before["inference_count"] + 1
        assert after["execution_count"] >= before["execution_count"] + 6
        for part in ("success", "queue", "compute_infer"):
            assert after["inference_stats"][part]["ns"] > before["inference_stats"][part]["ns"]


def test_tritonclient_over_grpc(server: Server, expected: Expected) -> None:
    ids, text = expected("Hello", 6)
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small")
        assert not client.is_model_ready("small", "2")
        assert not client.is_model_ready("large")
        assert client.get_server_metadata().name == "weft"
        assert client.get_model_metadata("small").versions == ["1"]
        config = client.get_model_config("small").config
        assert [one.name for one in config.input if not one.optional] == ["text_input"]
        assert not config.model_transaction_policy.decoupled
        assert client.get_model_repository_index().models[0].state == "READY"
        result = client.infer("small", inputs(triton_grpc, "Hello", max_tokens=6, logprobs=2), request_id="a")
        assert ids_of(result) == ids
        assert result.as_numpy("text_output").tolist() == [text.encode()]
        assert result.as_numpy("top_ids").shape == (6, 2)
        assert (result.get_response().id, result.get_response().model_version) == ("a", "1")
        packed = client.infer("small", inputs(triton_grpc, "Hello", max_tokens=6), compression_algorithm="gzip")
        assert ids_of(packed) == ids
        found: queue.Queue[Any] = queue.Queue()
        asked = inputs(triton_grpc, "Hello", max_tokens=6)
        client.async_infer("small", asked, lambda result, error: found.put(error or result))
        assert ids_of(found.get(timeout=30)) == ids
        assert client.get_inference_statistics("small").model_stats[0].inference_stats.success.count > 0


def test_log_probabilities_of_prompts(server: Server, folder: Path) -> None:
    """Those of the model by itself, over both protocols, and a stream's in its first response."""
    ids = [LETTERS.index(letter) for letter in "Hello"]
    with torch.inference_mode():
        logits = load_decoder(folder)[1](torch.tensor([ids]))[0, :-1]
    top = logits.log_softmax(dim=-1).topk(2)
    each = logits.log_softmax(dim=-1)[range(len(ids) - 1), ids[1:]]
    with triton_http.InferenceServerClient(server.http) as http, triton_grpc.InferenceServerClient(server.grpc) as rpc:
        for module, client in ((triton_http, http), (triton_grpc, rpc)):
            result = client.infer("small", inputs(module, "Hello", max_tokens=1, prompt_logprobs=2))
            assert np.allclose(result.as_numpy("prompt_logprobs"), each.numpy(), atol=1e-4)
            assert np.allclose(result.as_numpy("top_prompt_logprobs"), top.values.numpy(), atol=1e-4)
            assert result.as_numpy("top_prompt_ids").tolist() == top.indices.tolist()
            assert result.as_numpy("logprobs") is None
        found: queue.Queue[Any] = queue.Queue()
        rpc.start_stream(lambda result, error: found.put((result, error)))
        asked = inputs(triton_grpc, "Hello", max_tokens=3, prompt_logprobs=0, stream=True)
        rpc.async_stream_infer("small", asked, request_id="a")
        told = [one.as_numpy("prompt_logprobs") for one in read_stream(found, ends=1)["a"]]
        assert np.allclose(told[0], each.numpy(), atol=1e-4)
        assert told[1:] == [None, None]
        rpc.stop_stream()


def test_asyncio_clients(server: Server, expected: Expected) -> None:
    ids, _ = expected("Hello", 6)

    async def main() -> list[list[int]]:
        async with triton_http_aio.InferenceServerClient(server.http) as http:
            async with triton_grpc_aio.InferenceServerClient(server.grpc) as rpc:
                results = await asyncio.gather(
                    *(http.infer("small", inputs(triton_http, "Hello", max_tokens=6)) for _ in range(3)),
                    *(rpc.infer("small", inputs(triton_grpc, "Hello", max_tokens=6)) for _ in range(3)),
                )
                return [ids_of(result) for result in results]

    assert asyncio.run(main()) == [ids] * 6


def read_stream(found: queue.Queue[Any], ends: int) -> dict[str, list[Any]]:
    """Responses by request id, until as many as `ends` of them were final."""
    responses: dict[str, list[Any]] = {}
    while ends:
        result, error = found.get(timeout=30)
        response = result.get_response()
        assert error is None
        responses.setdefault(response.id, []).append(result)
        ends -= response.parameters["triton_final_response"].bool_param
    return responses


def test_a_stream_gives_each_token_and_says_which_is_the_last(server: Server, expected: Expected) -> None:
    found: queue.Queue[Any] = queue.Queue()
    prompts = ["Hello", "a", "Weft"]
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        for prompt in prompts:
            asked = inputs(triton_grpc, prompt, max_tokens=8, stream=True)
            client.async_stream_infer("small", asked, request_id=prompt, enable_empty_final_response=True)
        client.async_stream_infer("small", inputs(triton_grpc, "Hello", max_tokens=8), request_id="whole")
        responses = read_stream(found, ends=4)
        for prompt in prompts:
            ids, text = expected(prompt, 8)
            parts = responses[prompt]
            assert [ids_of(part) for part in parts] == [[id] for id in ids]
            assert b"".join(part.as_numpy("text_output")[0] for part in parts).decode() == text
            reasons = [part.as_numpy("finish_reason") for part in parts]
            assert reasons[:-1] == [None] * 7
            assert reasons[-1].tolist() == [b"length"]
        assert [ids_of(part) for part in responses["whole"]] == [expected("Hello", 8)[0]]
        client.async_stream_infer("large", asked)
        result, error = found.get(timeout=30)
        assert result is None
        assert "the model 'large' does not exist" in str(error)
        client.async_stream_infer("small", inputs(triton_grpc, "a", max_tokens=2), request_id="after")
        assert ids_of(read_stream(found, ends=1)["after"][0]) == expected("a", 2)[0]
        client.stop_stream()


def test_what_is_wrong_is_told(server: Server) -> None:
    http, rpc = triton_http.InferenceServerClient(server.http), triton_grpc.InferenceServerClient(server.grpc)
    cases: list[tuple[dict[str, Any], str, str, str]] = [
        ({"max_tokens": 0}, "400", "INVALID_ARGUMENT", "max_tokens is 0; it must be at least 1"),
        ({"top_p": 2.0}, "400", "INVALID_ARGUMENT", "top_p is 2.0"),
        ({"stream": True}, "400", "INVALID_ARGUMENT", "stream: only generate_stream and ModelStreamInfer"),
        ({"max_tokens": 4000, "logprobs": 21}, "400", "INVALID_ARGUMENT", "logprobs is 21; it must be from 0 to 20"),
        ({"nucleus": 1}, "400", "INVALID_ARGUMENT", "the model has no input 'nucleus'; it has text_input, input_ids"),
    ]
    for settings, status, code, words in cases:
        for client, module, told in ((http, triton_http, status), (rpc, triton_grpc, f"StatusCode.{code}")):
            with pytest.raises(InferenceServerException) as error:
                client.infer("small", inputs(module, "Hello", **settings))
            assert error.value.status() == told
            assert words in error.value.message()
    for client, module, told in ((http, triton_http, "404"), (rpc, triton_grpc, "StatusCode.NOT_FOUND")):
        for model, version in (("large", ""), ("small", "7")):
            with pytest.raises(InferenceServerException, match=r"does not exist|has no version .7.; it has 1") as error:
                client.infer(model, inputs(module, "Hello"), model_version=version)
            assert error.value.status() == told
    for client, told in ((http, "403"), (rpc, "StatusCode.PERMISSION_DENIED")):
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="--model-control allows it") as error:
                change("small")
            assert error.value.status() == told
    with pytest.raises(InferenceServerException):
        rpc.register_system_shared_memory("region", "/key", 64)
    with pytest.raises(InferenceServerException):
        http.register_system_shared_memory("region", "/key", 64)
    http.close()
    rpc.close()


def test_deadlines_end_requests_inside_the_engine(server: Server) -> None:
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        asked = inputs(triton_grpc, "Hello", max_tokens=4000)
        result = client.infer("small", asked, timeout=300_000)
        assert result.as_numpy("finish_reason").tolist() == [b"deadline"]
        assert 0 < len(ids_of(result)) < 4000
        with triton_http.InferenceServerClient(server.http) as http:
            result = http.infer("small", inputs(triton_http, "Hello", max_tokens=4000), timeout=300_000)
            assert result.as_numpy("finish_reason").tolist() == [b"deadline"]
            with pytest.raises(InferenceServerException, match="the deadline passed before the first token") as error:
                http.infer("small", inputs(triton_http, "Hello", max_tokens=4000), timeout=1)
            assert error.value.status() == "408"


# -- whoever leaves has cancelled -------------------------------------------------------------------------------------


def eventually(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_whoever_leaves_has_cancelled(server: Server) -> None:
    body = json.dumps({"text_input": "Hello", "max_tokens": 4000, "ignore_eos": True}).encode()

    def leave_http(route: str) -> None:
        host, port = server.http.split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v2/models/small/{route} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            eventually(lambda: server.running() > 0)

    def leave_call() -> None:
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            asked = inputs(triton_grpc, "Hello", max_tokens=4000)
            call = client.async_infer("small", asked, lambda result, error: None)
            eventually(lambda: server.running() > 0)
            call.cancel()

    def leave_stream() -> None:
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            found: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: found.put((result, error)))
            for _ in range(2):
                client.async_stream_infer("small", inputs(triton_grpc, "Hello", max_tokens=4000, stream=True))
            found.get(timeout=30)
            eventually(lambda: server.running() == 2)
            client.stop_stream(cancel_requests=True)

    ways = [
        (lambda: leave_http("generate"), 1), (lambda: leave_http("generate_stream"), 1), (leave_call, 1),
        (leave_stream, 2),
    ]  # fmt: skip
    for leave, count in ways:
        before = server.canceled()
        leave()
        eventually(lambda: server.running() == 0)
        eventually(lambda before=before, count=count: server.canceled() == before + count)


# -- curl, and whatever strangers send --------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Server, expected: Expected) -> None:
    ids, text = expected("Hello", 5)

    def curl(route: str, body: dict[str, Any]) -> str:
        address = f"http://{server.http}/v2/models/small/{route}"
        command = ["curl", "-sSN", "--fail", address, "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found = json.loads(curl("generate", {"id": "7", "text_input": "Hello", "parameters": {"max_tokens": 5}}))
    assert found == {
        "id": "7", "model_name": "small", "model_version": "1", "text_output": text, "output_ids": ids,
        "finish_reason": "length",
    }  # fmt: skip
    events = curl("versions/1/generate_stream", {"text_input": "Hello", "max_tokens": 5}).split("\n\n")
    assert events.pop() == ""
    parts = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(part["text_output"] for part in parts) == text
    assert [part.get("finish_reason") for part in parts] == [None] * 4 + ["length"]
    prompt = {"name": "input_ids", "datatype": "INT64", "shape": [2], "data": [1, 2]}
    outputs = json.loads(curl("infer", {"inputs": [prompt], "parameters": {"max_tokens": 3}}))["outputs"]
    assert [one["name"] for one in outputs] == ["text_output", "output_ids", "finish_reason"]


def test_what_asks_triton_asks_here_too(server: Server, expected: Expected) -> None:
    """In the words of Triton's vLLM backend, and of weft's."""
    _, text = expected("Hello", 5)
    body = {
        "text_input": "Hello", "exclude_input_in_output": False, "return_logprobs": True,
        "return_prompt_logprobs": True, "sampling_parameters": json.dumps({"max_tokens": 5, "temperature": 0}),
    }  # fmt: skip
    address = f"http://{server.http}/v2/models/small"
    found = httpx.post(f"{address}/generate", json=body).json()
    assert found["text_output"] == "Hello" + text
    assert (len(found["logprobs"]), len(found["prompt_logprobs"])) == (5, 4)
    assert "top_logprobs" not in found
    events = httpx.post(f"{address}/generate_stream", json=body).text.split("\n\n")[:-1]
    assert "".join(json.loads(event.removeprefix("data: "))["text_output"] for event in events) == "Hello" + text
    shorter = httpx.post(f"{address}/generate", json=body | {"max_tokens": 2}).json()
    assert len(shorter["output_ids"]) == 2  # what has a place of its own goes before
    with triton_http.InferenceServerClient(server.http) as client:
        result = client.infer("small", inputs(triton_http, "Hello", max_tokens=5, exclude_input_in_output=True))
        assert result.as_numpy("text_output")[0].decode() == text
    for wrong, words in (("[]", "must be a JSON table"), ('{"n": 2}', "no input 'n'"), ("{", "must be a JSON table")):
        refused = httpx.post(f"{address}/generate", json=body | {"sampling_parameters": wrong})
        assert refused.status_code == 400
        assert words in refused.json()["error"]


def test_aiperf_and_genai_perf_stream_so(server: Server) -> None:
    """Their `template` and `generate` endpoints: the prompt in the body, `text_output` in events, a status before them."""
    body = {"text_input": "Hello", "stream": True, "parameters": {"max_tokens": 5}}
    with httpx.stream("POST", f"http://{server.http}/v2/models/small/generate_stream", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-weft-version"] == "1"
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) == 5
    assert all(json.loads(line.removeprefix("data: "))["model_name"] == "small" for line in lines)
    refused = httpx.post(f"http://{server.http}/v2/models/small/generate_stream", json=body | {"top_k": -5})
    assert refused.status_code == 400  # nothing had begun: the status says so
    assert "top_k is -5" in refused.json()["error"]


@needs_perf_analyzer
@pytest.mark.parametrize("way", ["http", "grpc", "stream"])
def test_perf_analyzer_measures_the_server(server: Server, way: str, tmp_path: Path) -> None:
    asked = {"text_input": ["Hello"], "max_tokens": [TOKENS], "ignore_eos": [True]}
    if way == "stream":
        more = ("-i", "grpc", "--streaming", "--async")
        found = analyze(server.grpc, "small", tmp_path / "out", asked | {"stream": [True]}, *more)
        assert all(len(request["response_timestamps"]) >= TOKENS for request in found)
    else:
        address = server.http if way == "http" else server.grpc
        found = analyze(address, "small", tmp_path / "out", asked, "-i", way)
        assert all(len(request["response_timestamps"]) == 1 for request in found)


def test_malformed_bodies_get_4xx(server: Server) -> None:
    good = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [2], "data": [1, 2]}]}).encode()
    numbers = np.random.default_rng(0)
    statuses = set()
    with httpx.Client(base_url=f"http://{server.http}/v2/models/small/") as client:
        for _ in range(40):
            body = bytearray(good)
            for at in numbers.integers(len(body), size=numbers.integers(1, 6)):
                body[at] = numbers.integers(256)
            length = {"inference-header-content-length": str(numbers.integers(-2, 100))}
            for route, headers in (("infer", {}), ("infer", length), ("generate", {}), ("generate_stream", {})):
                statuses.add(client.post(route, content=bytes(body), headers=headers).status_code)
        assert client.post("infer", content=b"x" * (8 * 2**20 + 1)).status_code == 413
        assert client.post("infer", content=b"\xff", headers={"content-encoding": "gzip"}).status_code == 400
        assert client.post("nothing", content=b"").status_code == 404
        assert client.get("infer").status_code == 405
    assert statuses <= {200, 400}
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for data, code in (
            (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT), (b"x" * (9 * 2**20), grpc.StatusCode.RESOURCE_EXHAUSTED)
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError) as error:
                call(data, timeout=10)
            assert error.value.code() == code
        prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"Hello"]}}
        data = MESSAGES["ModelInferRequest"](model_name="small", inputs=[prompt]).SerializeToString()
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        told = [MESSAGES["ModelStreamInferResponse"].FromString(one) for one in stream(iter([b"\xff\xff", data, b"x"]))]
        errors = [one.error_message for one in told]
        assert sorted(errors) == ["", *["the bytes are no ModelInferRequest"] * 2]  # the others go on
        assert told[errors.index("")].infer_response.outputs
        codes = set()
        for _ in range(100):
            bent = bytearray(data)
            for at in numbers.integers(len(bent), size=numbers.integers(1, 4)):
                bent[at] = numbers.integers(256)
            try:
                call(bytes(bent), timeout=20)
            except grpc.RpcError as error:
                codes.add(error.code())
        assert codes == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        health = channel.unary_unary(
            "/grpc.health.v1.Health/Check", MESSAGES["HealthCheckRequest"].SerializeToString,
            MESSAGES["HealthCheckResponse"].FromString,
        )  # fmt: skip
        assert health(MESSAGES["HealthCheckRequest"]()).status == 1
        assert health(MESSAGES["HealthCheckRequest"](service="inference.GRPCInferenceService")).status == 1
        assert health(MESSAGES["HealthCheckRequest"](service="another")).status == 3


# -- keys, and models that come and go --------------------------------------------------------------------------------


def serve(config: ServerConfig, run: Callable[[Catalogue, int], Awaitable[None]]) -> None:
    """Something done with a server that speaks gRPC in this process."""

    async def main() -> None:
        catalogue = Catalogue(config)
        await catalogue.start()
        server, port = await start_grpc(catalogue, config)
        try:
            await run(catalogue, port)
        finally:
            await server.stop(None)
            await catalogue.close(0.0)

    asyncio.run(main())


def test_keys_on_every_method_and_models_that_come_and_go(folder: Path) -> None:
    config = ServerConfig(
        (ModelConfig("small", folder, EngineConfig(device="cpu")),),
        grpc_port=0,
        api_keys=("secret",),
        model_control=True,
    )
    names = [name.removesuffix("Request") for name in MESSAGES if name.endswith("Request")]
    names = [name for name in names if name not in ("HealthCheck", "ServerLive", "ServerReady")]

    async def main(catalogue: Catalogue, port: int) -> None:
        with pytest.raises(ValueError, match=f"gRPC cannot listen at 127.0.0.1:{port}"):
            await start_grpc(catalogue, ServerConfig(config.models, grpc_port=port))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for name in names:
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
                for keys in ((), (("authorization", "Bearer wrong"),)):
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await call(b"", metadata=keys)
                    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert await live(b"") == MESSAGES["ServerLiveResponse"](live=True).SerializeToString()
        key = {"authorization": "Bearer secret"}
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            await client.infer("small", inputs(triton_grpc, "Hello", max_tokens=2), headers=key)
            await client.unload_model("small", headers=key)
            assert not await client.is_model_ready("small", headers=key)
            with pytest.raises(InferenceServerException, match="not being served at the moment") as told:
                await client.infer("small", inputs(triton_grpc, "Hello"), headers=key)
            assert told.value.status() == "StatusCode.UNAVAILABLE"
            with pytest.raises(InferenceServerException, match="a load takes no parameters"):
                await client.load_model("small", headers=key, config="{}")
            await client.load_model("small", headers=key)
            assert (await client.get_model_metadata("small", headers=key)).versions == ["2"]
            await client.infer("small", inputs(triton_grpc, "Hello", max_tokens=2), headers=key, model_version="2")

    serve(config, main)


def test_a_client_that_does_not_read_its_stream_is_cut_off(folder: Path) -> None:
    config = ServerConfig(
        (ModelConfig("small", folder, EngineConfig(device="cpu")),), grpc_port=0, limits=Limits(stall_seconds=0.5)
    )
    settings = {"text_input": "Hello", "max_tokens": 4000, "logprobs": 20, "stream": True}
    kinds = {str: "string_param", int: "int64_param", bool: "bool_param"}
    parameters = {name: {kinds[type(value)]: value} for name, value in settings.items()}
    message = MESSAGES["ModelInferRequest"](model_name="small", parameters=parameters).SerializeToString()

    async def main(catalogue: Catalogue, port: int) -> None:
        statistics = catalogue.models["small"].statistics
        window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]  # what it takes unread
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", window) as channel:
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await call.write(message)
            async with asyncio.timeout(30):
                while not statistics.failures["CANCELED"]:
                    await asyncio.sleep(0.05)
                while catalogue.models["small"].current.desk.num_live:
                    await asyncio.sleep(0.05)
            call.cancel()

    serve(config, main)


def test_a_full_queue_refuses_and_a_dying_engine_says_so_and_comes_back(folder: Path) -> None:
    engine = EngineConfig(device="cpu", max_sequences=1, max_waiting=0)
    config = ServerConfig((ModelConfig("small", folder, engine),), grpc_port=0, apart=False)
    long = {"name": "max_tokens", "datatype": "INT32", "shape": [1], "contents": {"int_contents": [4000]}}
    prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"Hello"]}}
    message = MESSAGES["ModelInferRequest"](model_name="small", id="a", inputs=[prompt, long])
    message.parameters["stream"].bool_param = True

    def die() -> list[Any]:
        raise RuntimeError("a secret of the engine")

    async def main(catalogue: Catalogue, port: int) -> None:
        hosted = catalogue.models["small"]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await stream.write(message.SerializeToString())
            await stream.read()
            one = MESSAGES["ModelInferRequest"](model_name="small", inputs=[prompt]).SerializeToString()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await infer(one)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
            assert hosted.statistics.failures["REJECTED"] == 1
            engine_of(hosted.current).step = die  # type: ignore[method-assign]
            async with asyncio.timeout(30):
                error = ""
                while not error:
                    response = MESSAGES["ModelStreamInferResponse"].FromString(await stream.read())
                    error = response.error_message
                assert "the engine failed while it worked on this request" in error
                assert "secret" not in error
                assert response.infer_response.id == "a"
                assert response.infer_response.parameters["triton_final_response"].bool_param
                assert hosted.statistics.failures["BACKEND"] == 1
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await infer(one)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                while not (hosted.restarts and hosted.ready):
                    await asyncio.sleep(0.05)
            found = MESSAGES["ModelInferResponse"].FromString(await infer(one))
            assert found.model_version == "1"
            stream.cancel()

    serve(config, main)
