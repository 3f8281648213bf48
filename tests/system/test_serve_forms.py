"""A client that sends slow forms all the time, among others: serve/server/forms.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, engine_of, make_folder, model, served

from weft.serve.requests import forms as trying
from weft.serve.requests.forms import HELPERS, Helpers
from weft.serve.requests.grammar import GrammarCompiler
from weft.serve.server.forms import TURNS

ASK = {"model": "tiny", "prompt": "a", "max_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "tiny")


def post(server: Served, body: Any, key: str = "none", route: str = "/v1/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60, headers={"authorization": f"Bearer {key}"})


def begin(server: Served, key: str, body: Any) -> socket.socket:
    """A request whose client does not wait for the answer."""
    text = json.dumps(body)
    connection = socket.create_connection(("127.0.0.1", server.port))
    lines = [
        "POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json", f"Authorization: Bearer {key}",
        f"Content-Length: {len(text)}",
    ]  # fmt: skip
    connection.sendall("\r\n".join([*lines, "", text]).encode())
    return connection


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)


@contextmanager
def slow_forms(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What tries a form with "slow" in it is stopped: it looks like a form without an end. In the order of their turns.
    None gives way to others until that is allowed again, nor ends because this machine has much else to do."""
    helpers = engine_of(server.catalogue.models["tiny"].current).grammars._helpers
    ask, compile, asked = Helpers._ask, GrammarCompiler.compile, list[str]()

    def slowly(self: Helpers, helper: subprocess.Popen[bytes], kind: Any, text: str, end: float) -> str:
        asked.append(text)
        if "slow" in text:
            os.kill(helper.pid, signal.SIGSTOP)
            os.waitpid(helper.pid, os.WUNTRACED)
        return ask(self, helper, kind, text, end)

    monkeypatch.setattr(Helpers, "_ask", slowly)
    monkeypatch.setattr(trying, "FAIR_SECONDS", 600.0)
    monkeypatch.setattr(GrammarCompiler, "compile", lambda self, kind, text: compile(self, kind, text, 600.0))
    yield asked
    forms = server.catalogue.models["tiny"].forms
    monkeypatch.undo()
    while any(turn._value < TURNS for turn in forms._turns.values()):  # until what is under way has ended
        for helper in list(helpers._processes):
            helper.kill()
        time.sleep(0.05)
    until(lambda: not forms._held and not forms.shares._held)


def test_who_sends_slow_forms_holds_up_others_little(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model(folder, max_sequences=4, max_waiting=20), api_keys=("greedy", "modest")) as one:
        forms = one.catalogue.models["tiny"].forms
        with slow_forms(one, monkeypatch) as asked, ExitStack() as greedy:
            for number in range(12):
                greedy.enter_context(begin(one, "greedy", {**ASK, "guided_regex": f"slow{number}"}))
            helpers = engine_of(one.catalogue.models["tiny"].current).grammars._helpers
            until(lambda: forms._held == 12 and len(asked) == HELPERS and len(helpers._waiting) == TURNS - HELPERS)
            refused = post(one, {**ASK, "guided_regex": "slow"}, "greedy")
            assert refused.status_code == 429
            assert "12 completions of this key run or wait already, of 12 at most" in refused.text
            with ThreadPoolExecutor(1) as thread:
                quick = thread.submit(post, one, {**ASK, "guided_regex": "quick"}, "modest")
                until(lambda: len(helpers._waiting) == TURNS - HELPERS + 1)
                monkeypatch.setattr(trying, "FAIR_SECONDS", 0.5)
                told = quick.result()
            assert told.json()["choices"][0]["text"] == "quick"
            assert asked.index("quick") <= TURNS  # and not behind the twelve
            count = len(asked)
            assert post(one, {**ASK, "guided_regex": "quick"}, "modest").status_code == 200
            assert asked[count:].count("quick") == 0  # it was kept
            greedy.close()
            until(lambda: forms._held == 0)  # whoever hangs up waits no more


def test_a_deadline_holds_while_a_form_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever leaves has not made room for another slow form."""
    with served(model(folder, max_sequences=1, max_waiting=3)) as one:
        engine_of(one.catalogue.models["tiny"].current).grammars.compile("regex", "a")
        forms = one.catalogue.models["tiny"].forms
        with slow_forms(one, monkeypatch) as asked, ExitStack() as waiting:
            for number in range(TURNS + 1):
                late = post(one, {**ASK, "guided_regex": f"slow{number}", "timeout": 0.05})
                assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline")
                assert "the deadline passed before the regex was compiled" in late.text
            assert "slow3" not in asked
            for number in range(4):
                waiting.enter_context(begin(one, "none", {**ASK, "guided_regex": f"slow{number}"}))
            until(lambda: forms._held == 4)
            refused = post(one, {"text_input": "a", "lark": 'start: "b"'}, route="/v2/models/tiny/generate")
            assert refused.status_code == 429
            assert "4 requests wait for their form to be compiled already" in refused.json()["error"]
            counted = 'weft:requests_refused_total{model_name="tiny",reason="refused"} 1.0'
            assert counted in httpx.get(f"{one.url}/metrics").text
        told = post(one, {"text_input": "a", "lark": 'start: "yes" | "no"'}, route="/v2/models/tiny/generate")
        assert told.json()["text_output"] in ("yes", "no")
