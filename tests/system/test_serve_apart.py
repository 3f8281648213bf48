"""An engine in a process of its own: it gives what one on a thread gives, and however it ends, its streams end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import engine_of, make_folder, model, served

import weft.serve.cut.workers as workers
from weft.serve.apart import EngineProcess
from weft.serve.config import EngineConfig
from weft.serve.desk import DeadError, Desk
from weft.serve.engine import Engine
from weft.serve.loop import EngineLoop
from weft.serve.requests.request import Output, RefusedError, Request, Sampling
from weft.serve.server.errors import FAILED

CONFIG = EngineConfig(device="cpu", dtype="float32", max_sequences=4, max_waiting=8)
LONG = Sampling(max_tokens=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("apart") / "model")


@contextmanager
def apart(folder: Path, config: EngineConfig = CONFIG) -> Iterator[EngineProcess]:
    desk = EngineProcess(folder, config)
    desk.start()
    try:
        yield desk
    finally:
        desk.close()
        assert all(process.poll() is not None for process in desk.workers.processes)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[EngineProcess]:
    with apart(folder) as desk:
        yield desk


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


async def read(desk: Desk, request: Request) -> list[list[Output]]:
    """Of each completion."""
    found: list[list[Output]] = [[] for _ in range(request.n)]
    async for output in desk.stream(request):
        found[output.index].append(replace(output, cached=0, started=None))
    return found


def ask(desk: Desk) -> list[Any]:
    """All that a request may have, of several at once."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    requests = [
        Request("plain", [1, 2, 3], Sampling(max_tokens=20), logprobs=2, prompt_logprobs=1),
        Request("several", [5, 6], Sampling(1.0, top_k=20, seed=7, max_tokens=15, stop=("ab",)), n=3),
        Request("form", [9], Sampling(max_tokens=40), grammar=desk.grammars.compile("json_schema", schema)),
        *(Request(f"more {index}", [index, 4], Sampling(max_tokens=9)) for index in range(5)),
    ]

    async def main() -> list[Any]:
        return await asyncio.gather(*(read(desk, request) for request in requests))

    return [asyncio.run(main()), desk.embed([1, 2, 3]).result(30)]


def test_it_gives_what_a_thread_gives(folder: Path, shared: EngineProcess) -> None:
    loop = EngineLoop(Engine.load(folder, CONFIG))
    loop.start()
    assert shared.about == loop.about
    assert ask(shared) == ask(loop)
    until(lambda: shared.stats().finished == loop.stats().finished)
    assert shared.stats().new_tokens == loop.stats().new_tokens
    loop.close()


def test_a_form_is_compiled_once_and_a_malformed_one_is_told(shared: EngineProcess) -> None:
    assert shared.grammars.kept("regex", "[ab]+") is None
    form = shared.grammars.compile("regex", "[ab]+")
    assert shared.grammars.kept("regex", "[ab]+") == form
    with pytest.raises(ValueError, match="the regex cannot be compiled"):
        shared.grammars.compile("regex", "[ab")
    assert shared.grammars.kept("regex", "[ab") is None


def test_whoever_stops_reading_has_cancelled(shared: EngineProcess) -> None:
    async def main() -> None:
        async with aclosing(shared.stream(Request("a", [1, 2], LONG))) as outputs:
            async for _ in outputs:
                break
        while shared.num_live:
            await asyncio.sleep(0.005)

    asyncio.run(main())
    until(lambda: shared.stats().cache_used == 0)
    assert shared.stats().finished["cancelled"] >= 1


def test_a_deadline_ends_a_stream(shared: EngineProcess) -> None:
    [[*_, last]] = asyncio.run(read(shared, Request("late", [1, 2], LONG, deadline=time.monotonic() + 0.05)))
    assert last.finish == "deadline"


def test_a_full_queue_and_impossible_requests_are_refused_at_once(shared: EngineProcess) -> None:
    ended: list[Output] = []

    def submit_many() -> None:
        for index in range(13):
            shared.submit(Request(str(index), [1, 2], LONG), ended.append)

    with pytest.raises(RefusedError, match="8 completions are waiting already"):
        submit_many()
    with pytest.raises(ValueError, match="the prompt is empty"):
        shared.submit(Request("x", []), ended.append)
    with pytest.raises(ValueError, match="request id '0' is in use"):
        shared.submit(Request("0", [1]), ended.append)
    assert shared.num_live == 12
    for index in range(12):
        shared.cancel(str(index))
    until(lambda: not shared.num_live)
    shared.check_room(12)


def test_a_question_that_was_given_up_is_answered_to_nobody(shared: EngineProcess) -> None:
    given_up = shared.embed([1] * 500)
    assert given_up.cancel()
    assert len(shared.embed([1, 2]).result(30)) == shared.about.shape.hidden


def test_to_close_cancels_and_ends_the_process(folder: Path) -> None:
    told: list[Output] = []
    with apart(folder) as desk:
        desk.submit(Request("a", [1, 2], Sampling(1.0, max_tokens=500), n=2), told.append)
        until(lambda: told)
    assert [output.finish for output in told if output.finish] == ["cancelled"] * 2
    assert desk.workers.processes[0].poll() == 0
    with pytest.raises(DeadError, match="it was closed"):
        desk.submit(Request("b", [1]), told.append)
    with pytest.raises(DeadError, match="it was closed"):
        desk.embed([1])


def test_draining_lets_requests_end(folder: Path) -> None:
    told: list[Output] = []

    async def main(desk: EngineProcess) -> None:
        draining = asyncio.create_task(desk.drain(timeout=30))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="shutting down"):
            desk.submit(Request("late", [1, 2]), told.append)
        assert await draining

    with apart(folder) as desk:
        desk.submit(Request("a", [1, 2], LONG), told.append)
        asyncio.run(main(desk))
    assert told[-1].finish == "length"
    assert sum(len(output.tokens) for output in told) == 500


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_death_ends_streams_and_questions(folder: Path, end: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; of a process that was stopped, after a while of silence."""
    monkeypatch.setattr(workers, "SILENT_SECONDS", 2.5)
    told: list[Output] = []
    with apart(folder) as desk:
        desk.submit(Request("a", [1, 2], LONG), told.append)
        until(lambda: told)
        os.kill(desk.workers.processes[0].pid, end)
        question = desk.embed([1, 2])
        until(lambda: told[-1].finish)
        why = "gave no sign of life for 2.5 s, and was ended" if end == signal.SIGSTOP else "ended with exit code -9"
        assert str(desk.error) == f"the engine's process {why}"
        assert told[-1].finish == "error"
        assert isinstance(question.exception(10), DeadError)
        assert not desk.alive
        with pytest.raises(DeadError, match="the engine has ended: the engine's process"):
            desk.submit(Request("b", [1]), told.append)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_engine_fails_of_is_told(folder: Path) -> None:
    told: list[Output] = []
    with apart(folder, replace(CONFIG, tp=2)) as desk:
        desk.submit(Request("a", [1, 2], LONG), told.append)
        until(lambda: told)
        [worker] = children(desk.workers.processes[0].pid)
        os.kill(worker, signal.SIGKILL)
        until(lambda: told[-1].finish)
        assert str(desk.error) == "RankDiedError: process 1 of 2 ended with exit code -9"


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        EngineProcess(tmp_path / "none", CONFIG)
    with pytest.raises(ValueError, match="heads"):
        EngineProcess(folder, replace(CONFIG, tp=3))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_ends_with_the_server(folder: Path) -> None:
    code = (
        "import time; from pathlib import Path; from weft.serve.apart import EngineProcess\n"
        f"from weft.serve.config import EngineConfig; desk = EngineProcess(Path({str(folder)!r}), {CONFIG!r})\n"
        "desk.start(); print(desk.workers.processes[0].pid, flush=True); time.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.stdout is not None
    other = Path(f"/proc/{int(first.stdout.readline())}/status")
    first.kill()
    first.wait()
    first.stdout.close()
    until(lambda: not other.exists() or "State:\tZ" in other.read_text())


def test_a_server_of_such_engines_loses_one_and_has_it_back(folder: Path) -> None:
    short = {"prompt": "a", "max_tokens": 8, "temperature": 0}
    long = {"prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with served(model(folder)) as here:
        assert engine_of(here.catalogue.models["tiny"].current)
        expected = httpx.post(f"{here.url}/v1/completions", json=short, timeout=60).json()["choices"]
    with served(model(folder), apart=True) as one:
        url, hosted = f"{one.url}/v1/completions", one.catalogue.models["tiny"]
        assert httpx.post(url, json=short, timeout=60).json()["choices"] == expected
        desk = hosted.current.desk
        assert isinstance(desk, EngineProcess)
        with httpx.stream("POST", url, json=long, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(desk.workers.processes[0].pid, signal.SIGKILL)
            *_, error, done = [line for line in lines if line]
        assert (FAILED in error, done) == (True, "data: [DONE]")
        until(lambda: hosted.restarts == 1 and hosted.ready, 60)
        assert httpx.post(url, json=short, timeout=60).json()["choices"] == expected
        assert "vllm:num_requests_running" in httpx.get(f"{one.url}/metrics").text


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_reaches_all_processes_lets_answers_end(folder: Path, stop: signal.Signals) -> None:
    """As Ctrl-C in a terminal does, or a service's end."""
    command = [sys.executable, "-m", "weft", "serve", f"tiny={folder}", "--port", "0", "--device", "cpu", "--tp", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        lines = [next(process.stdout)]
        while not lines[-1].startswith("curl"):
            lines.append(next(process.stdout))
        found = re.search(r"http://127.0.0.1:(\d+)", lines[0])
        assert found
        body = {"prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"http://127.0.0.1:{found[1]}/v1/completions", json=body, timeout=60) as answer:
            told = answer.iter_lines()
            next(told)
            os.killpg(process.pid, stop)
            events = [line for line in told if line]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in events[-2] or '"finish_reason":"length"' in events[-2]
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def sockets(pid: int) -> set[str]:
    """Their numbers."""
    links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_else_has_an_end(folder: Path) -> None:
    """Their sockets have no name, and no process that they have begun has one of them."""
    with apart(folder, replace(CONFIG, tp=2)) as desk:
        desk.grammars.compile("json")  # which begins a helper
        inside = desk.workers.processes[0].pid
        here, there = sockets(os.getpid()), sockets(inside)
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        ours = os.readlink(f"/proc/self/fd/{desk._pipe.fileno()}")[8:-1]
        assert [line[7:] for line in lines if line[6] in {ours} | there] == [[]] * (
            1 + sum(line[6] in there for line in lines)
        )
        assert ours in here - there
        begun = children(inside)
        assert len(begun) >= 2
        for process in begun:
            assert not (here | there) & sockets(process)
