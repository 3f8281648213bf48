"""A server whose model is cut over two real processes: it answers as a whole one does, takes newer weights, and outlives
the death of either."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from served import Served, engine_of, make_folder, model, served

import weft.serve.server.hosted as hosted_module
from checkpoints import save_step
from weft.serve.server.errors import FAILED
from weft.serve.server.kserve.schema import MESSAGES

pytestmark = pytest.mark.slow

FLAT = {"spread": 0.02}  # nearly even odds: a low loss, for random weights
SHORT = {"prompt": "abc", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 500}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    save_step(make_folder(folder / "a", seed=1, **FLAT), folder / "run", 1)
    return folder / "run"


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Served]:
    """One model twice: whole, and cut."""
    with served(model(run, "cut", tp=2), model(run, "whole"), grpc_port=0) as one:
        yield one


def post(server: Served, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60)


def test_embeddings_are_the_whole_models(server: Served) -> None:
    found = {
        name: [
            one["embedding"] for one in post(server, "/v1/embeddings", model=name, input=["Hi", "abc"]).json()["data"]
        ]
        for name in ("whole", "cut")
    }
    for whole, cut in zip(found["whole"], found["cut"], strict=True):
        assert cut == pytest.approx(whole, abs=1e-5)
    texts = {post(server, "/v1/completions", model=name, **SHORT).json()["choices"][0]["text"] for name in found}
    assert len(texts) == 1  # nothing of it stays in the cache


def test_newer_weights_take_over(
    server: Served, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Both engines' processes run side by side until the old one's requests have ended."""
    hosted = server.catalogue.models["cut"]
    old = engine_of(hosted.current).ranks
    assert old is not None
    monkeypatch.setattr(hosted_module, "GRACE_SECONDS", 2.0)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "model": "cut", "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        save_step(make_folder(tmp_path / "b", seed=2, **FLAT), run, 2)
        server.call(server.catalogue.refresh)
        told = {name: post(server, "/v1/completions", model=name, **SHORT) for name in ("cut", "whole")}
        assert answer.headers["x-weft-version"] == "1"
        events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    assert {event["system_fingerprint"] for event in events} == {"weft-1"}
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert {one.headers["x-weft-version"] for one in told.values()} == {"2"}
    assert told["cut"].json()["choices"][0]["text"] == told["whole"].json()["choices"][0]["text"]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert not text.startswith(told["cut"].json()["choices"][0]["text"])
    save_step(make_folder(tmp_path / "c", seed=3, spread=0.5), run, 3)
    with pytest.raises(ValueError, match=r"is not served: loss .* and --gate allows 0.05"):
        server.call(hosted.refresh)
    assert post(server, "/v1/completions", model="cut", **SHORT).headers["x-weft-version"] == "2"
    limit = time.monotonic() + 60
    while [process.poll() for process in old.workers.processes] != [0]:  # first those who asked for it before
        assert time.monotonic() < limit
        time.sleep(0.02)


def openai(server: Served, begun: Future[None]) -> str:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "model": "cut", "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        begun.set_result(next(lines) and None)
        *_, error, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    return str(json.loads(error[6:])["error"]["message"])


def generate_stream(server: Served, begun: Future[None]) -> str:
    body = {"text_input": "abc", "max_tokens": 500, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v2/models/cut/generate_stream", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        begun.set_result(next(lines) and None)
        *_, error = [line for line in lines if line]
    return str(json.loads(error[6:])["error"])


def stream_infer(server: Served, begun: Future[None]) -> str:
    message = MESSAGES["ModelInferRequest"](model_name="cut", id="a")
    message.parameters["text_input"].string_param = "abc"
    message.parameters["max_tokens"].int64_param = 500
    message.parameters["ignore_eos"].bool_param = message.parameters["stream"].bool_param = True
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        answers = call(iter([message.SerializeToString()]), timeout=60)
        begun.set_result(next(answers) and None)
        *_, error = [MESSAGES["ModelStreamInferResponse"].FromString(answer) for answer in answers]
    assert error.infer_response.id == "a"
    return str(error.error_message)


def test_a_killed_process_ends_every_protocols_streams_and_comes_back(server: Served) -> None:
    hosted = server.catalogue.models["cut"]
    expected = post(server, "/v1/completions", model="cut", **SHORT).json()["choices"][0]["text"]
    version = hosted.current.number
    ranks = engine_of(hosted.current).ranks
    assert ranks is not None
    step = engine_of(hosted.current).step
    engine_of(hosted.current).step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign]
    with ThreadPoolExecutor(3) as threads:
        waits = [Future[None]() for _ in range(3)]
        ways = (openai, generate_stream, stream_infer)
        errors = [threads.submit(way, server, wait) for way, wait in zip(ways, waits, strict=True)]
        for wait in waits:
            wait.result(30)
        os.kill(ranks.workers.processes[0].pid, signal.SIGKILL)
        assert [error.result(30) for error in errors] == [FAILED] * 3
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    limit = time.monotonic() + 60
    while not (hosted.restarts == 1 and hosted.ready):
        assert time.monotonic() < limit
        time.sleep(0.02)
    again = post(server, "/v1/completions", model="cut", **SHORT)
    assert again.json()["choices"][0]["text"] == expected
    assert again.headers["x-weft-version"] == version
