"""A server among clients that hurry, hang up, attack, or ask for nonsense; and one whose engine dies or is replaced."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import Served, config, engine_of, make_folder, model, served

from checkpoints import save_step
from weft.cli.serve import describe
from weft.serve.desk import DeadError
from weft.serve.engine import Engine
from weft.serve.requests.request import Output, RefusedError, Request, Sampling
from weft.serve.server.config import ModelConfig, ServerConfig
from weft.serve.server.hosted import Hosted
from weft.serve.server.kserve.schema import MESSAGES
from weft.serve.server.limits import Limits
from weft.serve.server.run import listen, serve
from weft.serve.server.version import Version

LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    limits = Limits(receive_seconds=1.0, stall_seconds=1.0)
    with served(model(folder, max_sequences=4, max_waiting=4), limits=limits) as one:
        yield one


def post(server: Served, body: Any, route: str = "/v1/completions", **settings: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60, **settings)


def until(true: Callable[[], bool], seconds: float = 20) -> float:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)
    return time.monotonic() - start


def idle(server: Served) -> bool:
    loop = server.catalogue.models["tiny"].current.desk
    return loop.num_live == 0 and loop.stats().cache_used == 0


def raw(server: Served, *pieces: bytes, pause: float = 0.0) -> bytes:
    """All that the server says to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while more := connection.recv(65536):
                answer += more
        except ConnectionError:
            pass
        return answer


def request_bytes(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


# -- clients that go, wait and hurry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_hangs_up_has_cancelled(server: Served, stream: bool) -> None:
    body = json.dumps({**LONG, "n": 4, "temperature": 1.0, "stream": stream}).encode()
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(request_bytes(body, f"Content-Length: {len(body)}"))
        until(lambda: server.catalogue.models["tiny"].current.desk.stats().running > 0)
        connection.close()
    until(lambda: idle(server))


def test_a_reader_that_does_not_read_is_cut_off(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(server.catalogue.models["tiny"].current)
    step = engine.step

    def slowly() -> list[Output]:
        time.sleep(0.03)  # or a quick machine is done with the whole text before anybody has waited for the reader
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    cancelled = server.catalogue.models["tiny"].meter.ends["cancelled"]
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request_bytes(body, f"Content-Length: {len(body)}"))
        until(lambda: not idle(server))
        until(lambda: server.catalogue.models["tiny"].meter.ends["cancelled"] > cancelled, 60)
    until(lambda: idle(server))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(server: Served) -> None:
    outcomes: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(post(server, {**LONG, "max_tokens": 60}))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [one.status_code for one in outcomes]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 8
    refused = next(one for one in outcomes if one.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    texts = {one.json()["choices"][0]["text"] for one in outcomes if one.status_code == 200}
    assert len(texts) == 1
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="tiny", prompt=["a"] * 99, n=1, max_tokens=5)


def test_whoever_is_turned_away_may_ask_again_on_the_same_connection(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A refusal at the door is an answer like others: with an id, counted, and the body that comes after it is passed over,
    whenever it comes; what is not plain goes the usual way in, to the same end."""
    loop, meter = server.catalogue.models["tiny"].current.desk, server.catalogue.metrics
    body = json.dumps({**LONG, "max_tokens": 2}).encode()
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)

    def full(n: int = 1) -> None:
        raise RefusedError("7 completions are waiting already", 3.2)

    def answer(connection: socket.socket) -> tuple[str, dict[str, str], bytes]:
        with connection.makefile("rb") as file:
            status = file.readline().decode()
            lines = iter(lambda: file.readline().decode().strip(), "")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            return status, headers, file.read(int(headers["content-length"]))

    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for headers, tail in ((["X-Request-Id: mine", f"Content-Length: {len(body)}"], body),
                              (["X-Request-Id: mine", "Transfer-Encoding: chunked"], chunked)):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(loop, "check_room", full)
                before = meter.answers.labels("429")._value.get()
                connection.sendall(request_bytes(tail[:20], *headers))
                time.sleep(0.05)
                connection.sendall(tail[20:])
                status, told, text = answer(connection)
                assert meter.answers.labels("429")._value.get() == before + 1
            assert status.startswith("HTTP/1.1 429")
            assert json.loads(text)["error"]["message"] == "7 completions are waiting already"
            assert (told["retry-after"], told["x-request-id"], told["x-content-type-options"]) == (
                "4",
                "mine",
                "nosniff",
            )
            connection.sendall(request_bytes(body, f"Content-Length: {len(body)}"))
            assert answer(connection)[0].startswith("HTTP/1.1 200")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_room", full)
        late = raw(server, request_bytes(b"", f"Content-Length: {len(body)}"), b" ", pause=1.2)
        assert late == b""  # its body has as long as its headers, then it is cut off
        closed = raw(server, request_bytes(body, f"Content-Length: {len(body)}", "Connection: close"))
        assert b"connection: close" in closed


def test_deadlines(server: Served) -> None:
    told = post(server, {**LONG, "timeout": 0.15}).json()["choices"][0]
    assert told["finish_reason"] == "deadline"
    late = httpx.post(
        f"{server.url}/v1/completions", json={**LONG, "prompt": "a" * 400}, headers={"x-request-timeout": "0.000001"}
    )
    assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline")
    assert late.headers["x-should-retry"] == "false"
    until(lambda: idle(server))
    nonsense = httpx.post(f"{server.url}/v1/completions", json=LONG, headers={"x-request-timeout": "soon"})
    assert "it must be seconds" in nonsense.json()["error"]["message"]


# -- attacks ----------------------------------------------------------------------------------------------------------


def test_attacks_are_cut_off_while_others_are_served(server: Served) -> None:
    """Slow headers, a slow body, endless headers, a body in crumbs, one too large, one without an end, no HTTP."""
    whole = json.dumps(LONG).encode()
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in b"[" * 2000)
    attacks: list[tuple[Callable[[], bytes], bytes]] = [
        (lambda: raw(server, b"GET /", *[b"a"] * 30, pause=0.1), b""),
        (lambda: raw(server, request_bytes(b"", "Content-Length: 500"), *[b" "] * 5, pause=0.1), b"408"),
        (lambda: raw(server, request_bytes(b"", *[f"X-{number}: {'y' * 900}" for number in range(40)])), b"400"),
        (lambda: raw(server, request_bytes(crumbs, "Transfer-Encoding: chunked")), b"400"),
        (lambda: raw(server, request_bytes(b"", "Content-Length: 99999999999")), b"413"),
        (lambda: raw(server, request_bytes(b"FFFFFFFFFFFFFFFFF\r\n", "Transfer-Encoding: chunked")), b"400"),
        (lambda: raw(server, b"\x16\x03\x01\x02\x00nonsense\r\n\r\n"), b"400"),
        (lambda: raw(server, b"GET http://[ HTTP/1.1\r\n\r\n"), b"400"),
        (lambda: raw(server, b"GET /chat HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n"), b"404"),
    ]  # fmt: skip
    expected = post(server, {**LONG, "max_tokens": 20}).json()["choices"][0]["text"]
    answers: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda number=number, attack=attack: answers.update({number: attack()}))
        for number, (attack, _) in enumerate(attacks)
    ]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert post(server, {**LONG, "max_tokens": 20}).json()["choices"][0]["text"] == expected
    for thread in threads:
        thread.join()
    for number, (_, status) in enumerate(attacks):
        assert answers[number].startswith(b"HTTP/1.1 " + status if status else b""), (number, answers[number][:200])
        assert b"500" not in answers[number][:15]
    assert b"HTTP/1.1 200" in raw(server, request_bytes(whole, f"Content-Length: {len(whole)}", "Connection: close"))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt":' * 50_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"prompt": "a", "max_tokens": 1e400}',
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "top_p": Infinity}', b'{"prompt": ["a", 1]}', b'{"prompt": [true]}', b'{"prompt": [[]]}',
        b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "logit_bias": {"-4": 1}}',
        b'{"prompt": "a", "guided_regex": "(a+)+("}', b'{"prompt": "a", "guided_grammar": "start: start start"}',
        b'{"prompt": "a", "stop": ""}', b'{"prompt": "a", "stream_options": {"x": 1}}', b'{"prompt": "a", "n": 1.5}',
    ],
)  # fmt: skip
def test_nonsense_is_the_clients_mistake(server: Served, body: bytes) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=30
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_message_is_no_template(server: Served) -> None:
    for content in ("{{ 7 * 7 }}", "{% for a in range(10**9) %}{% endfor %}", "{{ ''.__class__ }}", "\ufdd07\ufdd1"):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        assert post(server, body, "/v1/chat/completions").status_code == 200
    told = post(server, {"messages": [{"role": "user", "content": "{{ 7 * 7 }}"}]}, "/tokenize").json()["tokens"]
    assert "{{ 7 * 7 }}" in post(server, {"tokens": told}, "/detokenize").json()["prompt"]


def test_what_is_no_json_by_its_own_account_is_refused(server: Served) -> None:
    """So a page somewhere else cannot make a browser ask here."""
    answer = httpx.post(
        f"{server.url}/v1/completions", content=json.dumps(LONG), headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415


def test_a_page_from_elsewhere_is_not_served_where_there_is_no_key(server: Served, folder: Path) -> None:
    """Not even by a name that leads to this machine."""

    def status(one: Served, origin: str, **more: str) -> int:
        return httpx.post(
            f"{one.url}/v1/completions", json={**LONG, "max_tokens": 2}, headers={"origin": origin, **more}
        ).status_code

    for origin in (
        "http://elsewhere.example:8000",
        "null",
        "http://127.0.0.1.elsewhere.example",
        "http://[",
        "chrome-extension://x",
    ):
        assert status(server, origin, host="elsewhere.example:8000") == 403, origin
    for origin in (server.url, "http://localhost:3000", "http://[::1]:8000"):
        assert status(server, origin) == 200, origin
    with served(model(folder), api_keys=("secret",)) as guarded, served(model(folder), open=True) as opened:
        assert status(guarded, "http://elsewhere.example") == 401
        assert status(guarded, "http://elsewhere.example", authorization="Bearer secret") == 200
        assert status(opened, "http://elsewhere.example") == 200


# -- keys and names ---------------------------------------------------------------------------------------------------


def test_every_route_wants_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model(folder), api_keys=("first", "second")) as one:
        from weft.serve.server.guard import OPEN

        routes = [(path, method) for path, method in all_routes(one) if path not in OPEN]
        assert len(routes) >= 8
        for path, method in [*routes, ("/nothing", "GET")]:
            status = httpx.request(method, f"{one.url}{path}").status_code
            assert status == (404 if path == "/nothing" else 401), path
        for wrong in ("Bearer third", "Basic first", "Bearer", "first", "Bearer first second"):
            assert httpx.get(f"{one.url}/v1/models", headers={"authorization": wrong}).status_code == 401

        def full(n: int = 1) -> None:
            raise RefusedError("busy", 1.0)

        with monkeypatch.context() as patch:  # how busy it is, a stranger is not told
            patch.setattr(one.catalogue.models["tiny"].current.desk, "check_room", full)
            for key, status in (("third", 401), ("first", 429)):
                assert post(one, LONG, headers={"authorization": f"Bearer {key}"}).status_code == status
        for path in ("/health", "/health/live", "/health/ready"):
            assert httpx.get(f"{one.url}{path}").status_code == 200
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=f"{one.url}/v1", api_key=key)
            usage = client.completions.create(model="tiny", prompt="q" * 64, max_tokens=1).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == 0  # a tenant sees nothing of another's
            client.close()


def test_what_touches_others_takes_an_administrators_key(folder: Path) -> None:
    """On both of KServe's protocols, and OpenAI's; anybody may stand behind others."""
    settings = {"api_keys": ("guest", "boss"), "admin_keys": ("boss",), "model_control": True, "grpc_port": 0}
    short, words = {**LONG, "max_tokens": 2}, "ask with an administrator's, which is marked so in the server's key file"
    asked = {"text_input": "a", "max_tokens": 2}
    ahead, behind = {**asked, "parameters": {"priority": -1}}, {**asked, "parameters": {"priority": 1}}
    with served(model(folder), **settings) as one:
        headers = {key: {"authorization": f"Bearer {key}"} for key in ("guest", "boss")}
        for body, route, allowed in (
            ({**short, "priority": -1}, "/v1/completions", False), ({**short, "priority": 1}, "/v1/completions", True),
            (ahead, "/v2/models/tiny/generate", False), (behind, "/v2/models/tiny/generate", True),
            (ahead, "/v2/models/tiny/generate_stream", False),
            ({}, "/v2/repository/models/tiny/unload", False), ({}, "/v2/repository/models/tiny/load", False),
        ):  # fmt: skip
            refused = post(one, body, route, headers=headers["guest"])
            assert refused.status_code == (200 if allowed else 403), route
            assert allowed or words in refused.text
            assert post(one, body, route, headers=headers["boss"]).status_code == 200, route
        with grpc.insecure_channel(f"127.0.0.1:{one.grpc_port}") as channel:
            prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"a"]}}
            first = MESSAGES["ModelInferRequest"](model_name="tiny", inputs=[prompt])
            first.parameters["priority"].int64_param = -1
            control = {name: MESSAGES[f"{name}Request"](model_name="tiny") for name in
                       ("RepositoryModelUnload", "RepositoryModelLoad")}  # fmt: skip
            for name, message in {"ModelInfer": first, **control}.items():
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
                with pytest.raises(grpc.RpcError) as error:
                    call(message.SerializeToString(), metadata=tuple(headers["guest"].items()))
                assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
                assert words in error.value.details()
                call(message.SerializeToString(), metadata=tuple(headers["boss"].items()))
            stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
            [told] = stream(iter([first.SerializeToString()]), metadata=tuple(headers["guest"].items()))
            assert words in MESSAGES["ModelStreamInferResponse"].FromString(told).error_message


def test_no_key_takes_all_the_room(folder: Path) -> None:
    """Half of it by default: whoever has more at once is refused, and whoever comes with another key is served."""
    with served(model(folder, max_sequences=2, max_waiting=6), api_keys=("greedy", "modest")) as one:
        hosted = one.catalogue.models["tiny"]
        engine = engine_of(hosted.current)
        step = engine.step
        engine.step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign]
        headers = {name: {"authorization": f"Bearer {name}"} for name in ("greedy", "modest")}
        refused = post(one, {**LONG, "prompt": ["a"] * 5, "max_tokens": 2}, headers=headers["greedy"])
        assert refused.status_code == 429
        assert "0 completions of this key run or wait already, of 4 at most" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        with httpx.stream(
            "POST", f"{one.url}/v1/completions", headers=headers["greedy"],
            json={**LONG, "prompt": ["a"] * 4, "stream": True}, timeout=60,
        ) as answer:  # fmt: skip
            lines = answer.iter_lines()  # kept: without a reader it hangs up
            next(lines)
            bodies = [
                ("/v1/completions", {**LONG, "max_tokens": 2}),
                ("/v2/models/tiny/generate", {"text_input": "a", "max_tokens": 2}),
                ("/v1/embeddings", {"input": "a"}),
            ]
            for route, body in bodies:
                before = refusals(one)
                assert post(one, body, route, headers=headers["greedy"]).status_code == 429, route
                assert refusals(one) == before + 1, route
            engine.step = step  # type: ignore[method-assign]
            for route, body in bodies:
                assert post(one, body, route, headers=headers["modest"]).status_code == 200, route
        until(lambda: idle(one))
        for route, body in bodies:  # what was held is given back: also by those who hang up, and who were refused
            assert post(one, body, route, headers=headers["greedy"]).status_code == 200, route
        assert not hosted.shares._held


def refusals(one: Served) -> float:
    """As Prometheus is told."""
    metrics = one.catalogue.metrics.registry
    return metrics.get_sample_value("weft:requests_refused_total", {"model_name": "tiny", "reason": "refused"}) or 0.0


def all_routes(one: Served) -> list[tuple[str, str]]:
    """Paths and methods, as FastAPI keeps them: a router that was included holds its own."""
    routes: list[Any] = []
    for route in one.server.config.app.routes:  # type: ignore[union-attr]
        routes += route.original_router.routes if hasattr(route, "original_router") else [route]
    return [(route.path.replace("{name:path}", "tiny"), next(iter(route.methods))) for route in routes]


def test_several_models(folder: Path, tmp_path: Path) -> None:
    with served(model(folder, "one"), model(make_folder(tmp_path / "other", seed=1), "two/b")) as both:
        client = openai.OpenAI(base_url=f"{both.url}/v1", api_key="x")
        texts = {
            name: client.completions.create(model=name, prompt="abc", max_tokens=20, temperature=0).choices[0].text
            for name in ("one", "two/b")
        }
        assert len(set(texts.values())) == 2
        assert client.models.retrieve("two/b").id == "two/b"
        client.close()


# -- an engine that dies, and weights that change ---------------------------------------------------------------------


def test_a_dead_engine_ends_its_streams_and_comes_back(folder: Path) -> None:
    with served(model(folder)) as one:
        hosted = one.catalogue.models["tiny"]
        engine = engine_of(hosted.current)
        expected = post(one, {**LONG, "max_tokens": 9}).json()["choices"][0]["text"]
        with httpx.stream("POST", f"{one.url}/v1/completions", json={**LONG, "stream": True}, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)

            def fail() -> None:
                raise MemoryError("a secret address: 0x7fffdeadbeef")

            engine.step = fail  # type: ignore[method-assign]
            died = time.monotonic()
            rest = [line for line in lines if line]
            assert time.monotonic() - died < 5  # on a machine that is busy with other tests
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert "secret" not in "".join(rest)
        until(lambda: hosted.restarts == 1)
        until(lambda: hosted.ready)
        assert httpx.get(f"{one.url}/health/ready").status_code == 200
        again = post(one, {**LONG, "max_tokens": 9})
        assert again.json()["choices"][0]["text"] == expected
        assert again.headers["x-weft-version"] == "1"


def test_alive_ready_and_generating_are_three_things(folder: Path) -> None:
    with served(model(folder), hang_seconds=0.3) as one:

        def ask(question: str) -> int:
            return httpx.get(f"{one.url}/health/{question}", timeout=30).status_code

        assert [ask(question) for question in ("live", "ready", "generate")] == [200, 200, 200]
        release = threading.Event()
        engine = engine_of(one.catalogue.models["tiny"].current)
        step = engine.step
        engine.step = lambda: (release.wait(30), step())[1]  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: post(one, {**LONG, "max_tokens": 2}))
        thread.start()
        until(lambda: ask("live") == 503)
        assert ask("ready") == 503
        release.set()
        thread.join()
        until(lambda: ask("live") == 200)
        one.call(one.catalogue.unload, "tiny")
        assert [ask(question) for question in ("live", "generate")] == [200, 503]
        late = post(one, LONG)
        assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (503, "not_ready", "1")
        one.call(one.catalogue.load, "tiny")
        assert post(one, {**LONG, "max_tokens": 2}).status_code == 200


async def ends(hosted: Hosted, version: Version) -> list[str | None]:
    with hosted.outputs([Request("late", [1], Sampling(max_tokens=1))], version) as outputs:
        return [output.finish async for output in outputs]


def test_newer_weights_take_over_without_a_pause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is being answered ends with the old ones; what is worse, or broken, never comes to be served."""
    run = tmp_path / "run"
    flat = {"spread": 0.02}  # nearly even odds: a low loss, for random weights
    save_step(make_folder(tmp_path / "a", seed=1, **flat), run, 1)
    with served(model(run)) as one:
        hosted = one.catalogue.models["tiny"]
        first = hosted.current
        assert one.call(hosted.refresh) is None
        with httpx.stream("POST", f"{one.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            save_step(make_folder(tmp_path / "b", seed=2, **flat), run, 2)
            one.call(hosted.refresh)
            told = post(one, {**LONG, "max_tokens": 3})
            assert told.headers["x-weft-version"] == "2"
            assert told.json()["system_fingerprint"] == "weft-2"
            assert answer.headers["x-weft-version"] == "1"
            events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
        assert {event["system_fingerprint"] for event in events} == {"weft-1"}
        assert one.call(ends, hosted, first) == ["length"]  # who took the old ones before is not refused
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        save_step(make_folder(tmp_path / "c", seed=3, spread=0.5), run, 3)
        with pytest.raises(ValueError, match=r"is not served: loss .* and --gate allows 0.05"):
            one.call(hosted.refresh)
        broken = save_step(make_folder(tmp_path / "d", seed=4, **flat), run, 4)
        weights = next((broken / "model").glob("*.safetensors"))
        weights.write_bytes(b"\xff" * weights.stat().st_size)
        with pytest.raises(ValueError, match="safetensors"):
            one.call(hosted.refresh)
        for asked in (False, False, True):  # the same, told to the log; who only looks for newer ones tries none twice
            one.call(one.catalogue.refresh, asked)
        assert len([record for record in caplog.records if "safetensors" in record.message]) == 2
        assert post(one, {**LONG, "max_tokens": 3}).headers["x-weft-version"] == "2"
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        one.call(one.catalogue.refresh)
        assert f"there is nothing newer than {run}/checkpoints/step-00000002/model" in caplog.text
        shutil.rmtree(run / "checkpoints")
        for asked in (False, False, True):
            one.call(one.catalogue.refresh, asked)
        assert len([record for record in caplog.records if "holds no model" in record.message]) == 2


def test_who_stops_it_waits_for_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer ones are given up, and let go of when they are there."""
    run = tmp_path / "run"
    save_step(make_folder(tmp_path / "a"), run, 1)
    with served(model(run)) as one:
        hosted = one.catalogue.models["tiny"]
        save_step(make_folder(tmp_path / "b"), run, 2)
        release, closed, load = threading.Event(), threading.Event(), Engine.load

        def slowly(*arguments: Any) -> Engine:
            release.wait(30)
            engine = load(*arguments)
            engine.close = closed.set  # type: ignore[method-assign]
            return engine

        monkeypatch.setattr(Engine, "load", slowly)
        refreshing = asyncio.run_coroutine_threadsafe(hosted.refresh(), one.loop)
        until(lambda: hosted.loading.under_way)
        assert one.call(one.catalogue.unload, "tiny") is None
        with pytest.raises(DeadError, match="unloaded meanwhile"):
            refreshing.result(5)
        assert hosted.loading.under_way
        release.set()
        until(closed.is_set)
        assert not hosted.loading.under_way
        one.call(one.catalogue.load, "tiny")
        assert post(one, {**LONG, "max_tokens": 2}).headers["x-weft-version"] == "2"


# -- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def patched_server(run: Path, patch: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`weft serve` with a fault in it, and the engine in it too."""
    words = ["weft", "serve", str(run), "--port", "0", "--device", "cpu", *options]
    here = (
        "import weft.serve.server.config as c, functools; c.ServerConfig = functools.partial(c.ServerConfig, apart=0)"
    )
    code = f"{patch}\n{here}\nimport sys; from weft.cli.app import main; sys.argv = {words!r}; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [0, 1])
def test_sigterm_waits_for_no_weights(tmp_path: Path, whole: int) -> None:
    """A process that reads its first ones, or newer ones, and would for a minute, ends all the same."""
    run = tmp_path / "run"
    save_step(make_folder(tmp_path / "a"), run, 1)
    patch = f"""
import time; from weft.serve.engine import Engine
load, times = Engine.load, []
def slowly(*arguments):
    times.append(1)
    if len(times) > {whole}: print('reading', flush=True), time.sleep(60)
    return load(*arguments)
Engine.load = slowly"""
    with patched_server(run, patch) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("curl"):
                save_step(make_folder(tmp_path / "b"), run, 2)
                process.send_signal(signal.SIGHUP)
            elif line == "reading\n":
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read() == "stopped\n"


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_engine_hangs(folder: Path) -> None:
    patch = """
import time; from weft.serve.engine import Engine; import weft.serve.server.run as run
Engine.step = lambda self: (print('hangs', flush=True), time.sleep(600))
run.LATE_SECONDS = 1"""
    with patched_server(folder, patch, "--drain", "0") as process:
        assert process.stdout is not None
        lines = [next(process.stdout)]
        while not lines[-1].startswith("curl"):
            lines.append(next(process.stdout))
        found = re.search(r":(\d+)", lines[0].split("//")[1])
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:
            body = json.dumps({"prompt": "a"}).encode()
            connection.sendall(request_bytes(body, f"Content-Length: {len(body)}"))
            while next(process.stdout) != "hangs\n":
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 1


@pytest.mark.slow
def test_sigterm_lets_what_is_being_answered_end(folder: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"  # what is drawn by chance is no end
    shutil.copytree(folder, endless)
    (endless / "generation_config.json").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", "serve", f"tiny={endless}", "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "WEFT_API_KEY": "key"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("curl"):
                break
        found = re.search(r"http://127.0.0.1:(\d+)", lines[0])
        assert found
        url = f"http://127.0.0.1:{found[1]}"
        curl = subprocess.run(["bash", "-c", lines[-1]], capture_output=True, env={**os.environ, "WEFT_API_KEY": "key"})
        assert json.loads(curl.stdout)["usage"]["completion_tokens"] == 16
        headers = {"authorization": "Bearer key"}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, headers=headers, timeout=60
        ) as answer:
            told = answer.iter_lines()
            next(told)
            process.send_signal(signal.SIGTERM)
            events = [line for line in told if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        assert process.stdout.read().strip() == "stopped"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_cannot_be_served_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="not a Jinja2 template"):
        asyncio.run(serve(config(model(broken))))
    odd = make_folder(tmp_path / "odd")
    for text, words in (
        ('{"top_p": 7}', ": top_p is 7; it must be above 0"), ("[]", " is not a table"), ("{", " is not JSON"),
    ):  # fmt: skip
        (odd / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"generation_config\.json{words}"):
            asyncio.run(serve(config(model(odd))))
    (broken / "tokenizer.json").write_text("{")
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: EOF while parsing"):
        asyncio.run(serve(config(model(broken))))
    with pytest.raises(ValueError, match=r"draft_tokens ahead, which is 0: set it \(--draft-tokens\)"):
        ModelConfig("a", tmp_path / "nowhere", draft=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"and its cache have no room on cpu; what helps: a smaller cache \(--cache-tok"
    ):
        asyncio.run(serve(config(model(folder, cache_tokens=10**11))))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*--port 0 takes a free port"):
            asyncio.run(serve(ServerConfig((model(folder),), port=port)))
    with listen(config(model(folder))) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*--port 0 takes a free port"):
            listen(ServerConfig((model(folder),), port=port))  # another server that has only begun
    with pytest.raises(ValueError, match=r"cannot listen on none\.invalid:0: [^;]+$"):
        asyncio.run(serve(ServerConfig((model(folder),), host="none.invalid", port=0, open=True)))


def test_a_context_that_the_cache_cuts_short_is_told(folder: Path) -> None:
    with served(model(folder), model(folder, "short", cache_tokens=64), model(folder, "meant", max_context=64)) as one:
        told = [describe(one.catalogue.models[name]) for name in ("tiny", "short", "meant")]
    assert "512 tokens of context, on cpu" in told[0]
    assert "64 tokens of context (of 512: the cache has no room for more, see --cache-tokens), on cpu" in told[1]
    assert "64 tokens of context, on cpu" in told[2]


def test_a_route_takes_head_where_it_takes_get_and_says_what_it_takes(server: Served) -> None:
    for path in ("/", "/health", "/v1/models"):
        asked, looked = httpx.get(f"{server.url}{path}"), httpx.head(f"{server.url}{path}")
        assert (looked.status_code, looked.content) == (200, b"")
        assert looked.headers["content-length"] == asked.headers["content-length"]
    for method, path, allowed in (("GET", "/v1/completions", "POST"), ("POST", "/v1/models", "GET, HEAD")):
        refused = httpx.request(method, f"{server.url}{path}")
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)


def test_metrics_have_vllms_names(server: Served) -> None:
    post(server, {**LONG, "max_tokens": 5})
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_sum",
        "request_queue_time_seconds_count", "request_prefill_time_seconds_count", "request_decode_time_seconds_count",
        "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_params_n_bucket",
        "request_inference_time_seconds_sum", "request_time_per_output_token_seconds_bucket",
        "request_max_num_generation_tokens_sum", "cache_config_info",
    ):  # fmt: skip
        assert re.search(rf'^vllm:{name}{{.*model_name="tiny".*}} ', text, re.MULTILINE), name
    assert re.search(r'vllm:cache_config_info{block_size="16",model_name="tiny",num_gpu_blocks="[1-9]\d*"} 1.0', text)
    assert re.search(r'vllm:request_success_total{finished_reason="length",model_name="tiny"} [1-9]', text)
    assert re.search(r'weft:http_answers_total{status="200"} [1-9]', text)


def test_of_several_prompts_none_begins_where_one_cannot(server: Served) -> None:
    def begun() -> list[str]:
        text = httpx.get(f"{server.url}/metrics").text
        return re.findall(r'^vllm:(?:request_success_total{finished_reason="abort"|prompt_tokens_total).*', text, re.M)

    before = begun()
    unknown = post(server, {**LONG, "prompt": [[1, 2], [9999]]})
    assert unknown.status_code == 400
    assert unknown.json()["error"]["message"].startswith(
        "prompt 2: the prompt has a token outside the model's vocabulary"
    )
    long = post(server, {**LONG, "prompt": ["a", "a" * 600]})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(server, {**LONG, "prompt": ["a"] * 99}).status_code == 429
    assert begun() == before


def test_traces_where_opentelemetry_is_set_up(server: Served) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    post(server, {**LONG, "max_tokens": 5}, headers={"traceparent": caller})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    engine = spans["generate tiny"]
    assert engine.context is not None
    assert f"{engine.context.trace_id:032x}" in caller
    assert engine.parent is not None
    assert engine.parent.span_id in [span.context.span_id for span in spans.values() if span.context is not None]
    assert engine.attributes is not None
    assert engine.attributes["gen_ai.usage.output_tokens"] == 5
    assert engine.attributes["gen_ai.response.finish_reasons"] == ("length",)


def test_a_request_for_the_engine_alone_still_works(server: Served) -> None:
    """Other protocols use the same way in."""

    async def main() -> list[str | None]:
        with server.catalogue.get("tiny").outputs([Request("x", [1, 2], Sampling(max_tokens=3))]) as outputs:
            return [output.finish async for output in outputs]

    assert server.call(main) == [None, None, "length"]
