"""What production brings, injected: too much of everything, storms of hang-ups, models that come and go under load, weights
that are no numbers. (Others of the kind stand where their subject does: docs/serve.md lists them all.)"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from served import Served, engine_of, make_folder, model, served

from checkpoints import save_step
from weft.serve import pace
from weft.serve.engine import Engine
from weft.serve.server import hosted as hosted_module

LONG = {"prompt": "abc", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(model(folder, max_sequences=8, max_waiting=300)) as one:
        yield one


def post(server: Served, body: Any, route: str = "/v1/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60)


def idle(server: Served, seconds: float = 20) -> None:
    """Wait until every block and place is given back."""
    loop = server.catalogue.models["tiny"].current.desk
    until = time.monotonic() + seconds
    while loop.num_live or loop.stats().running or loop.stats().waiting or loop.stats().cache_used:
        assert time.monotonic() < until, loop.stats()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {**SHORT, "n": 10**9, "temperature": 1}),
        ("/v1/completions", {**SHORT, "best_of": 10**9, "temperature": 1}),
        ("/v1/completions", {**SHORT, "logprobs": 10**9}),
        ("/v1/completions", {**SHORT, "prompt_logprobs": 10**9}),
        ("/v1/completions", {**SHORT, "prompt": ["a"] * 10**5}),
        ("/v1/completions", {**SHORT, "prompt": "a" * 10**6}),
        ("/v1/completions", {**SHORT, "prompt": [1] * 10**6}),
        ("/v1/completions", {**SHORT, "stop": [str(number) for number in range(10**5)]}),
        ("/v1/completions", {**SHORT, "stop": ["a" * 10**6]}),
        ("/v1/completions", {**SHORT, "logit_bias": {str(number): 1 for number in range(10**5)}}),
        ("/v1/completions", {**SHORT, "guided_regex": "a" * 10**6}),
        ("/v1/completions", {**SHORT, "max_tokens": 0, "echo": True, "logprobs": 20, "prompt": ["a" * 10**4] * 128}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 10**5}),
        ("/v1/embeddings", {"input": ["a"] * 10**5}),
        ("/v2/models/tiny/generate", {"text_input": "a", "logprobs": 10**9}),
        ("/v2/models/tiny/generate", {"text_input": "a", "stop": ["a"] * 10**5}),
        ("/v2/models/tiny/infer", {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [10**12], "data": [1]}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_too_much_is_refused_before_anything_is_computed(server: Served, route: str, body: dict[str, Any]) -> None:
    loop = server.catalogue.models["tiny"].current.desk
    steps = loop.stats().steps
    answer = post(server, body, route)
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.text) < 2000  # and is not told back
    assert loop.stats().steps == steps


def test_a_storm_of_hang_ups_leaves_nothing_behind(server: Served) -> None:
    """200 clients go, at random moments: while they are read, wait, are prefilled or answered, streaming or not."""
    chance = random.Random(0)

    async def client(delay: float, stream: bool) -> None:
        await asyncio.sleep(chance.random())
        body = json.dumps({**LONG, "prompt": "a" * chance.randrange(1, 90), "stream": stream}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        lines = ["POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
        whole = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
        writer.write(whole[: len(whole) if delay > 0.05 else chance.randrange(len(whole))])
        await asyncio.sleep(delay)
        writer.transport.abort()

    async def storm() -> None:
        await asyncio.gather(*(client(chance.random() ** 2, number % 2 == 0) for number in range(200)))

    expected = post(server, SHORT).json()["choices"][0]["text"]
    asyncio.run(storm())
    idle(server)
    assert server.catalogue.models["tiny"].restarts == 0
    assert post(server, SHORT).json()["choices"][0]["text"] == expected


def test_a_model_comes_and_goes_under_load(folder: Path) -> None:
    """Clients see answers, whole and right, or 503: nothing else, and nothing in between."""
    with served(model(folder), drain_seconds=0.0) as one:
        expected = post(one, SHORT).json()["choices"][0]["text"]
        seen: Counter[int] = Counter()

        async def clients() -> None:
            async def client(http: httpx.AsyncClient) -> None:
                while not over.is_set():
                    answer = await http.post(f"{one.url}/v1/completions", json=SHORT)
                    seen[answer.status_code] += 1
                    if answer.status_code == 200:
                        assert answer.json()["choices"][0]["text"] == expected
                    else:
                        assert int(answer.headers["retry-after"]) >= 1
                        await asyncio.sleep(0.01)

            over = asyncio.Event()
            async with httpx.AsyncClient(timeout=60) as http, asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(client(http))
                for _ in range(8):
                    await asyncio.sleep(0.1)
                    await asyncio.to_thread(one.call, one.catalogue.unload, "tiny")
                    await asyncio.to_thread(one.call, one.catalogue.load, "tiny")
                over.set()

        asyncio.run(clients())
        assert seen.keys() <= {200, 503}
        assert seen[200] > 8
        answer = post(one, SHORT)
        assert (answer.status_code, answer.headers["x-weft-version"]) == (200, "9")
        idle(one)


def engines() -> int:
    return sum(thread.name == "weft-engine" for thread in threading.enumerate())


def test_whoever_has_a_model_unloaded_may_leave(folder: Path) -> None:
    """It is unloaded all the same, when what is being answered has ended."""
    with served(model(folder), model_control=True) as one:
        loop = one.catalogue.models["tiny"].current.desk
        step = loop.engine.step
        loop.engine.step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign]
        with httpx.stream(
            "POST", f"{one.url}/v1/completions", json={**LONG, "max_tokens": 80, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{one.url}/v2/repository/models/tiny/unload", timeout=0.2)
            assert json.loads([line for line in lines if line][-2][6:])["choices"][0]["finish_reason"] == "length"
        loop._thread.join(20)
        assert not loop._thread.is_alive()


def kill_engine(one: Served) -> None:
    """By its next step, which somebody asks for."""

    def fail() -> None:
        raise MemoryError

    engine_of(one.catalogue.models["tiny"].current).step = fail  # type: ignore[method-assign]
    assert post(one, SHORT).status_code == 503


def test_a_model_is_loaded_once_however_many_ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(one: Served) -> None:
        await asyncio.gather(one.catalogue.load("tiny"), one.catalogue.load("tiny"))

    before = engines()
    with served(model(folder)) as one:
        hosted = one.catalogue.models["tiny"]
        one.call(one.catalogue.unload, "tiny")
        one.call(both, one)
        assert (hosted.current.number, engines() - before) == ("2", 1)
        monkeypatch.setattr(hosted_module, "PAUSES", (0.5,))
        kill_engine(one)
        while hosted.restarts == 0:
            time.sleep(0.01)
        one.call(one.catalogue.load, "tiny")  # sooner than it would have come back by itself
        version = hosted.current
        time.sleep(0.8)
        assert hosted.current is version
        assert engines() - before == 1
        assert post(one, SHORT).status_code == 200


def test_an_engine_comes_back_though_its_checkpoint_is_gone(tmp_path: Path) -> None:
    """A run keeps its last checkpoints alone."""
    run = tmp_path / "run"
    first = save_step(make_folder(tmp_path / "a", seed=1), run, 1)
    with served(model(run)) as one:
        hosted = one.catalogue.models["tiny"]
        save_step(make_folder(tmp_path / "b", seed=2), run, 2)
        shutil.rmtree(first)
        kill_engine(one)
        while not (hosted.restarts and hosted.ready):
            time.sleep(0.01)
        answer = post(one, SHORT)
        assert (answer.status_code, answer.headers["x-weft-version"]) == (200, "2")


def test_what_is_loaded_for_nobody_is_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()
    monkeypatch.setattr(Engine, "close", lambda self: closed.set())

    async def leave(one: Served) -> None:
        loading = asyncio.create_task(one.catalogue.models["tiny"]._load(folder))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        loading.cancel()
        await asyncio.wait([loading])
        assert loading.cancelled()

    with served(model(folder)) as one:
        one.call(leave, one)
        assert closed.wait(20)


def test_a_hang_is_noticed_by_the_pace_of_the_steps_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before a minute is over, which a first step may take."""
    monkeypatch.setattr(pace, "SURE_SECONDS", 0.5)
    monkeypatch.setattr(pace, "TIMES", 4)
    with served(model(folder)) as one:
        loop = one.catalogue.models["tiny"].current.desk
        assert loop.patience(60.0) == 60.0
        post(one, SHORT)
        assert loop.patience(60.0) < 60
        release, step = threading.Event(), loop.engine.step
        loop.engine.step = lambda: (release.wait(30), step())[1]  # type: ignore[method-assign]
        thread = threading.Thread(target=post, args=[one, SHORT])
        thread.start()
        while httpx.get(f"{one.url}/health/live").status_code == 200:
            time.sleep(0.05)
        assert not release.is_set()
        release.set()
        thread.join()
        assert httpx.get(f"{one.url}/health/live").status_code == 200


def test_weights_that_are_no_numbers_fail_loudly_and_alone(folder: Path, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    shutil.copytree(folder, sick)
    [file] = sick.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with served(model(folder), model(sick, "sick")) as one:
        for route, body in (
            ("/v1/completions", {**SHORT, "model": "sick"}),
            ("/v1/embeddings", {"model": "sick", "input": "a"}),
            ("/v2/models/sick/generate", {"text_input": "abc", "max_tokens": 4}),
        ):
            answer = post(one, body, route)
            assert (answer.status_code, "not finite numbers" in answer.text) == (500, True)
        found = httpx.get(f"{one.url}/health/generate")
        assert (found.status_code, found.json()["models"]) == (503, {"tiny": True, "sick": False})
        assert post(one, {**SHORT, "model": "tiny"}).status_code == 200
        assert one.catalogue.models["sick"].restarts == 0
