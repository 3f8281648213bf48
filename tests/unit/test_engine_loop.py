"""The engine's thread: streams end however it ends, and what it cannot take it refuses at once."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from contextlib import aclosing

import pytest
import torch

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.desk import DeadError
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.loop import EngineLoop, Job
from weft.serve.requests.request import Output, RefusedError, Request, Sampling

SHAPE = Shape(num_layers=1, hidden=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn=64, vocab=97, max_seq=512)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE.model_copy(update={"init_std": 0.3}))


def start(model: Decoder, **settings: int) -> EngineLoop:
    loop = EngineLoop(Engine(model, None, EngineConfig(**settings)))
    loop.start()
    return loop


async def read(loop: EngineLoop, request: Request) -> tuple[list[int], Output]:
    tokens: list[int] = []
    async for output in loop.stream(request):
        tokens += output.tokens
    return tokens, output


def test_many_streams_at_once_give_what_each_gives_alone(model: Decoder) -> None:
    prompts = [[1 + index, 2, 3] * (1 + index % 3) for index in range(12)]
    expected = [complete(model, [prompt], Sampling(max_tokens=15))[0] for prompt in prompts]
    loop = start(model, max_sequences=4)

    async def main() -> list[tuple[list[int], Output]]:
        requests = [Request(str(index), prompt, Sampling(max_tokens=15)) for index, prompt in enumerate(prompts)]
        found = await asyncio.gather(*(read(loop, request) for request in requests))
        assert await loop.drain(timeout=10)
        return found

    found = asyncio.run(main())
    assert [tokens for tokens, _ in found] == expected
    assert all(last.finish == "length" for _, last in found)
    assert not loop.alive
    assert loop.num_live == 0
    assert loop.stats().finished == {"length": 12}


def test_whoever_stops_reading_has_cancelled(model: Decoder) -> None:
    loop = start(model)

    async def main() -> None:
        async with aclosing(loop.stream(Request("a", [1, 2], Sampling(max_tokens=400)))) as outputs:
            async for _ in outputs:
                break
        while loop.num_live:
            await asyncio.sleep(0.005)
        reader = asyncio.create_task(read(loop, Request("b", [1, 2], Sampling(max_tokens=400))))
        await asyncio.sleep(0.05)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        while loop.num_live:
            await asyncio.sleep(0.005)

    asyncio.run(main())
    assert loop.stats().finished == {"cancelled": 2}
    assert loop.stats().cache_used == 0
    loop.close()


def test_a_deadline_ends_a_stream(model: Decoder) -> None:
    loop = start(model)
    request = Request("a", [1, 2], Sampling(max_tokens=500), deadline=time.monotonic() + 0.02)
    tokens, last = asyncio.run(read(loop, request))
    assert last.finish == "deadline"
    assert len(tokens) < 500
    loop.close()


def test_a_full_queue_and_impossible_requests_are_refused_at_once(model: Decoder) -> None:
    loop = start(model, max_sequences=1, max_waiting=2)
    ended: list[Output] = []

    def submit_many() -> None:
        for index in range(10):
            loop.submit(Request(str(index), [1, 2], Sampling(max_tokens=200)), ended.append)

    with pytest.raises(RefusedError, match="completions are waiting already") as refused:
        submit_many()
    assert refused.value.retry_after >= 1
    taken = loop.num_live
    assert 2 <= taken <= 4
    with pytest.raises(ValueError, match="the prompt is empty"):
        loop.submit(Request("x", []), ended.append)
    with pytest.raises(ValueError, match="request id '0' is in use"):
        loop.submit(Request("0", [1]), ended.append)
    loop.close()
    assert [output.finish for output in ended if output.finish] == ["cancelled"] * taken
    with pytest.raises(DeadError, match="it was closed"):
        loop.submit(Request("y", [1]), ended.append)


def test_draining_refuses_and_cancels_what_takes_too_long(model: Decoder) -> None:
    loop = start(model)
    ended: list[Output] = []
    loop.submit(Request("long", [1, 2], Sampling(max_tokens=500)), ended.append)

    async def main() -> None:
        draining = asyncio.create_task(loop.drain(timeout=0.05))
        await asyncio.sleep(0.01)
        with pytest.raises(RefusedError, match="shutting down"):
            loop.submit(Request("late", [1, 2]), ended.append)
        assert not await draining

    asyncio.run(main())
    assert ended[-1].finish == "cancelled"


def test_a_failure_ends_every_stream_and_says_why(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = start(model)
    failed = threading.Event()
    step = loop.engine.step

    def failing() -> list[Output]:
        if failed.is_set():
            raise RuntimeError("out of luck")
        return step()

    monkeypatch.setattr(loop.engine, "step", failing)

    async def main() -> list[tuple[list[int], Output]]:
        readers = [
            asyncio.create_task(read(loop, Request("a", [1, 2], Sampling(max_tokens=500)))),
            asyncio.create_task(read(loop, Request("b", [1, 2], Sampling(1.0, max_tokens=500), n=2))),
        ]
        await asyncio.sleep(0.05)
        failed.set()
        return await asyncio.wait_for(asyncio.gather(*readers), timeout=1)

    for _, last in asyncio.run(main()):
        assert last.finish == "error"
        assert last.error == "the engine failed: RuntimeError: out of luck"
    assert not loop.alive
    with pytest.raises(DeadError, match="the engine has ended: out of luck"):
        loop.submit(Request("c", [1]), lambda output: None)
    loop.close()


def test_a_failure_is_told_though_the_engine_waits_for_ever(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it waits for a process that died: whoever noticed tells all requests, what comes late is told to none."""
    loop = start(model)
    stuck, release = threading.Event(), threading.Event()
    step = loop.engine.step

    def waiting() -> list[Output]:
        outputs = step()
        stuck.set()
        release.wait(30)
        return outputs

    monkeypatch.setattr(loop.engine, "step", waiting)
    told: list[Output] = []
    loop.submit(Request("a", [1, 2], Sampling(1.0, max_tokens=500), n=2), told.append)
    assert stuck.wait(30)
    loop.fail(RuntimeError("a process died"))
    assert [output.error for output in told] == ["the engine failed: RuntimeError: a process died"] * 2
    with pytest.raises(DeadError, match="the engine has ended: a process died"):
        loop.submit(Request("b", [1]), told.append)
    loop.fail(RuntimeError("another too"))
    release.set()
    loop.close()
    assert len(told) == 2


def test_a_call_that_was_given_up_does_not_stop_the_end() -> None:
    given_up, waiting = Job(lambda engine: None, Future()), Job(lambda engine: None, Future())
    given_up.future.cancel()
    for job in (given_up, waiting):
        job.refuse(DeadError("the engine has ended"))
    assert given_up.future.cancelled()
    with pytest.raises(DeadError, match="the engine has ended"):
        waiting.future.result(0)
