"""NVIDIA's own Triton, from pip, serves a model that weft trained over two processes, to NVIDIA's own client."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
import tritonclient.http as http_client
from forked import SHAPE, settings, train
from profiled import LETTERS, REQUESTS, TOKENS, needs_aiperf, profile
from served import SHAPE as PLAIN
from served import SPECIAL, make_adapter, make_folder
from tritonclient.utils import InferenceServerException

from weft.checkpoint.folder import checkpoints
from weft.checkpoint.weights import load_decoder
from weft.export.triton.repository import export_triton
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.requests.request import Request, Sampling

LONG = 2000
VOCAB = 256 + len(SPECIAL)
PATIENCE = 240
"""Seconds for a start on a machine that does much else; alone it takes eight."""


@dataclass
class Served:
    """A running `weft serve-triton`."""

    process: subprocess.Popen[str]
    log: Path
    http: int
    grpc: int

    def ask(self, method: str = "POST", path: str = "generate", **body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        connection.request(method, f"/v2/models/small/{path}", json.dumps(body) if body else None)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text else None

    def stubs(self) -> list[int]:
        """Of this Triton alone: what serve-triton began, began them."""
        return [pid for pid in descendants(self.process.pid) if b"triton_python_backend_stub" in command(pid)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a little, with a tokenizer of bytes and room for long texts."""
    run = tmp_path_factory.mktemp("trained") / "small"
    words = make_folder(run.parent / "tokenizer")
    shape = {**SHAPE, "max_seq": LONG + 100, "vocab": VOCAB}
    train(settings(run, model=shape, train={"steps": 3}, data={"tokenizer": str(words)}))
    return checkpoints(run / "checkpoints")[0] / "model"


@pytest.fixture(scope="module")
def adapter(trained: Path) -> Path:
    """Of the trained model's."""
    folder = trained.parents[3] / "adapter"
    make_adapter(trained, folder, folder.with_name("merged"), seed=1)
    return folder


@contextmanager
def serving(repository: Path) -> Iterator[Served]:
    """A Triton on a repository, until its models answer, and what is left of it afterwards: nothing."""
    log = repository.with_name("log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "weft", "serve-triton", str(repository),
             *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--drain-seconds", "5")],
            stdout=file, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        wait_for(lambda: "ready: HTTP" in log.read_text() or process.poll() is not None)
        found = re.search(r"ready: HTTP http://127.0.0.1:(\d+), gRPC 127.0.0.1:(\d+)", log.read_text())
        assert found, log.read_text()
        yield Served(process, log, int(found[1]), int(found[2]))
    finally:
        began = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        left = [pid for pid in began if alive(pid)]
        assert (code, left) == (0, []), log.read_text()


@pytest.fixture(scope="module")
def served(trained: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """In Triton, cut over two processes, from a folder whose name the stub's Python cannot read."""
    folder = tmp_path_factory.mktemp("triton")
    export_triton(trained, folder / "möbel", "small", tp=2, adapters={"tuned": adapter})
    with serving(folder / "möbel") as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[tuple[grpc.InferenceServerClient, queue.Queue]]:
    """NVIDIA's, with a stream open, and what comes back on it."""
    client = grpc.InferenceServerClient(f"127.0.0.1:{served.grpc}")
    answers: queue.Queue = queue.Queue()
    client.start_stream(partial(lambda answers, result, error: answers.put((result, error)), answers))
    yield client, answers
    client.stop_stream(cancel_requests=True)
    client.close()


def inputs(prompt: list[int], **settings: Any) -> list[grpc.InferInput]:
    kinds = {bool: ("BOOL", np.bool_), int: ("INT32", np.int32), float: ("FP32", np.float32)}
    made = [grpc.InferInput("input_ids", [len(prompt)], "INT64")]
    made[0].set_data_from_numpy(np.array(prompt, dtype=np.int64))
    for name, value in settings.items():
        kind, dtype = kinds[type(value)]
        made.append(grpc.InferInput(name, [1], "INT64" if name == "seed" else kind))
        made[-1].set_data_from_numpy(np.array([value], dtype=np.int64 if name == "seed" else dtype))
    return made


def responses(answers: queue.Queue) -> Iterator[Any]:
    """Of one stream, to its end."""
    reason = None
    while reason is None:
        result, error = answers.get(timeout=PATIENCE)
        assert error is None, error
        reason = result.as_numpy("finish_reason")
        yield result


def read_streams(answers: queue.Queue, count: int) -> dict[str, tuple[list[int], list[float], str, int]]:
    """Until so many requests ended: of each its tokens, log-probabilities, reason, and the number of responses."""
    found: dict[str, tuple[list[int], list[float], str, int]] = {}
    while sum(bool(one[2]) for one in found.values()) < count:
        result, error = answers.get(timeout=PATIENCE)
        assert error is None, error
        id = result.get_response().id
        tokens, logprobs, _, responses = found.get(id, ([], [], "", 0))
        more, reason = result.as_numpy("logprobs"), result.as_numpy("finish_reason")
        found[id] = (
            tokens + result.as_numpy("output_ids").tolist(),
            logprobs + ([] if more is None else more.tolist()),
            "" if reason is None else reason[0].decode(),
            responses + 1,
        )
    return found


@pytest.mark.slow
def test_many_streams_at_once_are_what_the_engine_gives_alone(
    served: Served, client: tuple[grpc.InferenceServerClient, queue.Queue], trained: Path
) -> None:
    talker, answers = client
    prompts = [[1 + n, 2, 3, 5 + n] for n in range(6)]
    for n, prompt in enumerate(prompts):
        sampled = {"temperature": 0.9, "seed": 7} if n % 2 else {}
        made = inputs(prompt, stream=True, max_tokens=12, return_logprobs=True, **sampled)
        talker.async_stream_infer("small", made, request_id=str(n))
    found = read_streams(answers, len(prompts))
    engine = Engine.load(trained, EngineConfig(device="cpu"))
    for n, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=12, eos=engine.eos, **({"temperature": 0.9, "seed": 7} if n % 2 else {}))
        tokens, logprobs, reason, responses = found[str(n)]
        assert tokens == complete_one(engine, prompt, sampling)
        assert len(logprobs) == len(tokens)
        assert max(logprobs) < 0
        assert reason in ("length", "stop")
        assert 1 <= responses <= len(tokens)
    assert any(responses > 1 for *_, responses in found.values())  # they came one after the other


def complete_one(engine: Engine, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> list[int]:
    engine.add(Request("x", prompt, sampling, adapter=adapter))
    return [token for _ in iter(lambda: engine.busy, False) for output in engine.step() for token in output.tokens]


@pytest.mark.slow
def test_one_response_for_those_who_want_no_stream(served: Served, trained: Path) -> None:
    status, answer = served.ask(input_ids=[1, 2, 3], max_tokens=9)
    assert status == 200
    whole = Engine.load(trained, EngineConfig(device="cpu")).runner.model
    assert answer["output_ids"] == complete(whole, [[1, 2, 3]], Sampling(max_tokens=9))[0]
    assert answer["finish_reason"] == "length"
    _, again = served.ask(input_ids=[1, 2, 3], sampling_parameters=json.dumps({"max_tokens": "9", "temperature": "0"}))
    assert again == answer  # as vLLM's clients ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input_ids": [1], "max_token": 3}, "max_token: unknown; a request may have text_input"),
        ({"input_ids": [1], "temperature": -1}, "temperature is -1.0; it must be from 0"),
        ({"input_ids": [999]}, f"a token outside the model's vocabulary of {VOCAB}"),
        ({"max_tokens": 3}, "give the prompt as text_input, or as input_ids"),
        ({"input_ids": [1], "lora_name": "wild"}, "adapter is 'wild'; this engine has tuned"),
        ({"input_ids": [1], "n": 2**31 - 1}, "n is 2147483647; it must be at least 1, and at most 320"),
        ({"input_ids": [1], "n": 2}, "every completion is the same at temperature 0"),
        ({"input_ids": [1], "regex": "("}, "the regex cannot be compiled"),
        ({"input_ids": [1], "lark": "start: x"}, "the lark cannot be compiled"),
        ({"input_ids": [1], "regex": "a", "lark": "{}"}, "regex and lark: a text has one form; leave all but one"),
        ({"input_ids": [1], "sampling_parameters": "{"}, "sampling_parameters is not JSON"),
    ],
)
def test_a_bad_request_is_told_why_and_harms_nobody(served: Served, body: dict[str, Any], said: str) -> None:
    status, answer = served.ask(**body)
    assert status == 400
    assert said in answer["error"]
    assert served.ask(input_ids=[1, 2, 3], max_tokens=2)[0] == 200


@pytest.mark.slow
def test_texts_have_the_form_that_was_asked_for(served: Served) -> None:
    status, answer = served.ask(text_input="a", json_schema=json.dumps({"enum": ["yes", "no"]}), max_tokens=60)
    assert status == 200
    assert json.loads(answer["text_output"]) in ("yes", "no")
    assert answer["finish_reason"] == "stop"
    grammar = 'start: "per" "haps"~1..3 "!"'
    _, answer = served.ask(text_input="a", lark=grammar, max_tokens=60)
    assert re.fullmatch("per(haps){1,3}!", answer["text_output"])
    body = {"text_input": "a", "stream": True, "max_tokens": 30, "temperature": 1.0}
    events = [json.loads(line) for line in streamed(served, **body, parameters={"regex": "[0-9]{3}(yes|no)"})]
    assert re.fullmatch("[0-9]{3}(yes|no)", "".join(event["text_output"] for event in events))
    assert len(events) > 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompts_log_probabilities_are_the_models(
    served: Served, client: tuple[grpc.InferenceServerClient, queue.Queue], trained: Path, stream: bool
) -> None:
    talker, answers = client
    prompt = [1, 2, 3, 200, 7, 7]
    made = inputs(prompt, stream=stream, max_tokens=5, ignore_eos=True, return_prompt_logprobs=True)
    talker.async_stream_infer("small", made)
    told = [result.as_numpy("prompt_logprobs") for result in responses(answers)]
    assert [one is not None for one in told] == [True] + [False] * (len(told) - 1)
    with torch.inference_mode():
        logprobs = load_decoder(trained)[1](torch.tensor([prompt])).float().log_softmax(-1)[0]
    expected = [logprobs[at, token].item() for at, token in enumerate(prompt[1:])]
    assert np.allclose(told[0], expected, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_is_asked_for_by_its_name(served: Served, trained: Path, adapter: Path) -> None:
    engine = Engine.load(trained, EngineConfig(device="cpu", adapters={"tuned": str(adapter)}))
    told = [served.ask(input_ids=[1, 2, 3], max_tokens=12, **more)[1] for more in ({}, {"lora_name": "tuned"})]
    expected = [complete_one(engine, [1, 2, 3], Sampling(max_tokens=12), name) for name in (None, "tuned")]
    assert [one["output_ids"] for one in told] == expected
    assert expected[0] != expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_several_completions_of_one_prompt(
    served: Served, client: tuple[grpc.InferenceServerClient, queue.Queue], trained: Path, stream: bool
) -> None:
    talker, answers = client
    sampled: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 3}
    made = inputs([1, 2, 3], n=3, stream=stream, return_logprobs=True, exclude_input_in_output=True, **sampled)
    talker.async_stream_infer("small", made)
    texts: list[bytes] = [b""] * 3
    tokens: list[list[int]] = [[], [], []]
    count, reasons = 0, ()
    for result in responses(answers):
        texts = [a + b for a, b in zip(texts, result.as_numpy("text_output"), strict=True)]
        ids, lengths = result.as_numpy("output_ids").tolist(), result.as_numpy("lengths").tolist()
        assert len(result.as_numpy("logprobs")) == len(ids) == sum(lengths)
        for mine, length in zip(tokens, lengths, strict=True):
            mine += [ids.pop(0) for _ in range(length)]
        count, reasons = count + 1, result.as_numpy("finish_reason")
    assert count > 1 if stream else count == 1
    assert all(reason in (b"length", b"stop") for reason in reasons)
    engine = Engine.load(trained, EngineConfig(device="cpu"))
    engine.add(Request("x", [1, 2, 3], Sampling(eos=engine.eos, **sampled), n=3))
    expected: list[list[int]] = [[], [], []]
    words = [""] * 3
    while engine.busy:
        for output in engine.step():
            expected[output.index] += output.tokens
            words[output.index] += output.text
    assert tokens == expected
    assert [text.decode() for text in texts] == words
    assert len(set(words)) == 3


@needs_aiperf
@pytest.mark.slow
def test_aiperf_measures_triton(served: Served, trained: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.json"
    template.write_text(
        '{"text_input": {{ text|tojson }}, "max_tokens": {{ max_tokens }}, "stream": true, "regex": "' + LETTERS + '"}'
    )
    before = metrics_of(served)
    told = profile(
        f"http://127.0.0.1:{served.http}", "small", trained, tmp_path / "out", "--endpoint-type", "template",
        "--endpoint", "/v2/models/small/generate_stream", "--extra-inputs", f"payload_template:{template}",
        "--extra-inputs", "response_field:text_output",
    )  # fmt: skip
    assert told["inter_token_latency"]["avg"] > 0
    wait_for(lambda: risen(served, before, "vllm:generation_tokens_total{") >= REQUESTS * TOKENS)
    assert risen(served, before, 'vllm:request_success_total{finished_reason="length"') >= REQUESTS


def risen(served: Served, before: dict[str, float], name: str) -> float:
    """By how much one of the engine's counters has."""
    return metrics_of(served).get(name, 0) - before.get(name, 0)


@pytest.mark.slow
def test_a_deadline_ends_a_request(served: Served) -> None:
    status, answer = served.ask(input_ids=[1, 2], max_tokens=LONG, ignore_eos=True, parameters={"timeout": 300_000})
    assert (status, answer["finish_reason"]) == (200, "deadline")
    assert len(answer["output_ids"]) < LONG


@pytest.mark.slow
def test_a_stream_that_is_left_is_cancelled(served: Served) -> None:
    client = grpc.InferenceServerClient(f"127.0.0.1:{served.grpc}")
    answers: queue.Queue = queue.Queue()
    client.start_stream(partial(lambda answers, result, error: answers.put((result, error)), answers))
    client.async_stream_infer("small", inputs([1, 2], stream=True, max_tokens=LONG, ignore_eos=True))
    answers.get(timeout=PATIENCE)
    client.stop_stream(cancel_requests=True)
    client.close()
    wait_for(lambda: metrics_of(served).get('vllm:request_success_total{finished_reason="cancelled"') == 1)
    assert metrics_of(served)["vllm:num_requests_running{"] == 0


def metrics_of(served: Served) -> dict[str, float]:
    """The engine's, as Triton reports them: name and reason → number."""
    port = re.search(r"metrics http://127.0.0.1:(\d+)/metrics", served.log.read_text())
    assert port
    connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r'^(vllm:\w+\{(?:finished_reason="\w+")?).*\} ([\d.]+)', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_streams_and_the_engine_comes_back(served: Served) -> None:
    [stub] = served.stubs()
    rank = next(pid for pid in descendants(stub) if b"weft.serve.cut.follow" in command(pid))
    lines = streamed(served)
    next(lines)
    os.kill(rank, signal.SIGKILL)
    *_, last = lines
    assert json.loads(last)["error"] == "the engine failed, and is started again"
    wait_for(lambda: served.ask(input_ids=[1], max_tokens=2)[0] == 200)
    assert served.stubs() == [stub]


@pytest.mark.slow
def test_a_stub_that_dies_ends_the_streams_and_comes_back(served: Served) -> None:
    [stub] = served.stubs()
    lines = streamed(served)
    first = next(lines)
    os.kill(stub, signal.SIGKILL)
    *_, last = first, *lines  # which ends, for Triton closes its connections, and without a reason
    assert "finish_reason" not in json.loads(last)
    wait_for(lambda: "Triton is back, and its models answer" in served.log.read_text())
    assert "the process that runs small died; Triton is started again" in served.log.read_text()
    assert served.ask(input_ids=[1], max_tokens=2)[0] == 200
    assert served.stubs() != [stub]
    assert not alive(stub)


def streamed(served: Served, **body: Any) -> Iterator[str]:
    """The events of a stream, of a long one where nothing else is asked."""
    connection = http.client.HTTPConnection("127.0.0.1", served.http, timeout=PATIENCE)
    body = body or {"input_ids": [1, 2], "stream": True, "max_tokens": LONG, "ignore_eos": True}
    connection.request("POST", "/v2/models/small/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode()
    connection.close()


GRAPHS = {"onnxruntime": ("input_ids", "logits"), "aoti": ("INPUT__0", "OUTPUT__0")}


@pytest.mark.slow
def test_graphs_give_the_models_logits(tmp_path: Path) -> None:
    """Their configs are as NVIDIA's own backends take them; which pip's Triton has not, and weft stands in for."""
    shape = PLAIN.model_copy(update={"num_layers": 1, "max_seq": 40})
    folder = make_folder(tmp_path / "plain", shape=shape)
    for backend in GRAPHS:
        export_triton(folder, tmp_path / "models", backend, backend)
    _, decoder = load_decoder(folder)
    with (
        serving(tmp_path / "models") as running,
        http_client.InferenceServerClient(f"127.0.0.1:{running.http}") as asks,
    ):

        def logits(backend: str, tokens: torch.Tensor) -> np.ndarray:
            entry, out = GRAPHS[backend]
            given = http_client.InferInput(entry, list(tokens.shape), "INT64")
            given.set_data_from_numpy(tokens.numpy())
            return asks.infer(backend, [given]).as_numpy(out)

        for size in ((1, 1), (2, 7), (1, 40)):
            tokens = torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(size[1]))
            with torch.inference_mode():
                expected = decoder(tokens).float().numpy()
            for backend in GRAPHS:
                assert np.allclose(logits(backend, tokens), expected, atol=1e-4), (backend, size)
        stubs = running.stubs()
        for backend in GRAPHS:
            told = logits(backend, torch.tensor([[1, VOCAB], [1, 2], [-1, 2]]))
            assert np.isnan(told[[0, 2]]).all()
            with torch.inference_mode():
                assert np.allclose(told[1], decoder(torch.tensor([[1, 2]]))[0], atol=1e-4)
            assert np.isnan(logits(backend, torch.zeros(1, 41, dtype=torch.long))).all()
            with pytest.raises(InferenceServerException):
                logits(backend, torch.zeros(1, 0, dtype=torch.long))
        assert running.stubs() == stubs
        os.kill(stubs[0], signal.SIGKILL)
        wait_for(lambda: "Triton is back, and its models answer" in running.log.read_text())
        assert re.search("the process that runs (onnxruntime|pytorch) died", running.log.read_text())
        for backend in GRAPHS:
            assert np.allclose(logits(backend, tokens), expected, atol=1e-4), backend


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.1)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    return bool(command(pid))


def descendants(pid: int) -> list[int]:
    """Processes that a process began, and those that these began."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found
