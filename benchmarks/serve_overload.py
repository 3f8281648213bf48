"""Claim: asked ten times as much as it can do, the server does about as much as ever, and refuses the rest at once.

    python benchmarks/serve_overload.py
    python benchmarks/serve_overload.py --size 0.1b --seconds 20 --rounds 3

In rounds, each: peak (as many clients as fit, each asking again when it is answered), the same where each has a key of its
own, overload (requests at ten times that rate, whatever comes back), and good clients (two, one request after the other, of
one key) alone and beside each attack. Attackers have another key; those who hang up, once the good clients' own. Answers
differ in length, so that they do not end together. The server is a process of its own, and so is nothing else: clients and
server share the machine's cores. Two models: one of the size of GPT-2's smallest, and one so small that to refuse ten times
as many is work worth counting.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from common import RESULTS, ROOT, spread, write

sys.path.insert(0, str(ROOT / "tests" / "system"))
from served import SHAPE, make_folder

SIZES = {
    "0.1b": {"num_layers": 12, "hidden": 768, "num_heads": 12, "num_kv_heads": 12, "ffn": 2048},
    "tiny": {"num_layers": 4, "hidden": 256, "num_heads": 8, "num_kv_heads": 4, "ffn": 512},
}
SEQUENCES, WAITING = 8, 16
LENGTHS = random.Random(0)
KEYS = [f"key-{number}" for number in range(SEQUENCES + 1)]
GOOD, BAD = KEYS[0], KEYS[-1]


class Answer(NamedTuple):
    """A request's status (0: none), how long it took, and when it was over."""

    status: int
    took: float
    end: float


async def ask(port: int, key: str = GOOD) -> Answer:
    """One request on a connection of its own."""
    start = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(body(LENGTHS.randint(12, 36)), key))
        answer = await reader.read(-1)
        writer.close()
    except OSError:
        answer = b""
    end = time.monotonic()
    return Answer(int(answer[9:12] or 0), end - start, end)


async def closed(port: int, clients: int, seconds: float, keys: Sequence[str] = (GOOD,)) -> list[Answer]:
    """Clients that ask again when they are answered; these are their keys, in turn."""
    end, found = time.monotonic() + seconds, list[Answer]()

    async def client(key: str) -> None:
        while time.monotonic() < end:
            found.append(await ask(port, key))

    await asyncio.gather(*(client(keys[number % len(keys)]) for number in range(clients)))
    return found


def flood(port: int, rate: float, seconds: float) -> list[Answer]:
    """Requests at a rate, each on a connection of its own, whatever comes back. It costs little, for it takes the server's
    cores: no task for each, and no buffers."""
    found, begun, start = list[Answer](), 0, time.monotonic()
    with selectors.DefaultSelector() as open_ones:
        while begun < seconds * rate or open_ones.get_map():
            while begun < min(time.monotonic() - start, seconds) * rate:
                one = socket.create_connection(("127.0.0.1", port))
                one.sendall(post(body(LENGTHS.randint(12, 36)), GOOD))
                open_ones.register(one, selectors.EVENT_READ, (time.monotonic(), bytearray()))
                begun += 1
            for key, _ in open_ones.select(timeout=0.002):
                begin, answer = key.data
                assert isinstance(key.fileobj, socket.socket)
                piece = key.fileobj.recv(1 << 16)
                answer += piece
                if not piece:
                    end = time.monotonic()
                    found.append(Answer(int(answer[9:12] or 0), end - begin, end))
                    open_ones.unregister(key.fileobj)
                    key.fileobj.close()
    return found


def rate(answers: list[Answer], start: float, seconds: float) -> float:
    """Good answers a second, once it has got going: in the last three quarters of the time."""
    from_, until = start + seconds / 4, start + seconds
    return sum(one.status == 200 and from_ <= one.end < until for one in answers) / (until - from_)


# -- attacks: each goes on until it is cancelled ------------------------------------------------------------------------


async def slow_headers(port: int) -> None:
    async def one() -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                for byte in b"GET /" + b"a" * 1000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(5)
            except OSError:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(200)))


async def send_often(port: int, data: bytes, pause: float) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            await reader.read(-1)
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(pause)


def body(tokens: int) -> bytes:
    return json.dumps({"prompt": "a good request", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}).encode()


def post(body: bytes, key: str = BAD) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        "Connection: close",
        f"Authorization: Bearer {key}",
    ]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def hang_ups(port: int, key: str) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(body(400), key))
            await asyncio.sleep(0.1)
            writer.transport.abort()
        except OSError:
            await asyncio.sleep(0.1)


ATTACKS: dict[str, Callable[[int], Awaitable[None]]] = {
    "slow headers, 200 connections": slow_headers,
    "nonsense, deep JSON": lambda port: send_often(port, post(b"[" * 100_000), 0.05),
    "8 MB of text": lambda port: send_often(port, post(json.dumps({"prompt": "a" * 8_000_000}).encode()), 0.2),
    "hang-ups": lambda port: hang_ups(port, BAD),
    "hang-ups with their own key": lambda port: hang_ups(port, GOOD),
}


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


async def measure(port: int, seconds: float) -> dict[str, Any]:
    """One round."""
    found: dict[str, Any] = {}
    start = time.monotonic()
    peak = rate(await closed(port, SEQUENCES, seconds), start, seconds)
    start = time.monotonic()
    found["peak of eight keys / of one"] = rate(await closed(port, SEQUENCES, seconds, KEYS), start, seconds) / peak
    start = time.monotonic()
    answers = flood(port, 10 * peak, seconds)
    done = [one for one in answers if one.status == 200]
    refused = [one.took for one in answers if one.status == 429]
    found["peak, requests/s"] = peak
    found["goodput / peak"] = rate(answers, start, seconds) / peak
    found["asked"], found["refused"] = len(answers), len(refused)
    found["others"] = len(answers) - len(done) - len(refused)
    found["refusal ms, median"], found["refusal ms, p99"] = median(refused) * 1e3, p99(refused) * 1e3
    alone = p99([one.took for one in await closed(port, 2, seconds)])
    found["good clients' p99 s, alone"] = alone
    for name, attack in ATTACKS.items():
        task = asyncio.ensure_future(attack(port))
        await asyncio.sleep(0.2)
        beside = await closed(port, 2, seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert all(one.status == 200 for one in beside), name
        found[f"good clients' p99 beside {name}, over alone"] = p99([one.took for one in beside]) / alone
        await asyncio.sleep(0.5)
    return found


def serve(size: str, seconds: float, rounds: int) -> dict[str, Any]:
    """The median and the spread of each figure over rounds, of a server of a model of a size."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_folder(Path(folder) / "model", spread=0.02, shape=SHAPE.model_copy(update=SIZES[size]))
        keys = Path(folder) / "keys"
        keys.write_text("\n".join(KEYS))
        process = subprocess.Popen(
            [sys.executable, "-m", "weft", "serve", str(path), "--port", "0", "--device", "cpu", "--max-sequences",
             str(SEQUENCES), "--max-waiting", str(WAITING), "--api-key-file", str(keys), "--max-per-key",
             str(SEQUENCES + WAITING)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = []
            while not (lines and lines[-1].startswith("curl")):
                lines.append(process.stdout.readline())
            port = int(re.search(r":(\d+)", lines[0].split("//")[1])[1])  # type: ignore[index]
            asyncio.run(closed(port, 2, 1))  # warm
            found = [asyncio.run(measure(port, seconds)) for _ in range(rounds)]
        finally:
            process.terminate()
            process.wait(60)
    return {name: spread([one[name] for one in found]) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="only this model")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [arguments.size] if arguments.size else list(SIZES)
    found = {size: serve(size, arguments.seconds, arguments.rounds) for size in sizes}
    print(json.dumps(found, indent=2))
    results = {} if len(found) == len(SIZES) else json.loads((RESULTS / "serve_overload.json").read_text())["results"]
    results |= {size: {"seconds": arguments.seconds, "rounds": arguments.rounds, **one} for size, one in found.items()}
    write("serve_overload", {"results": results}, ("torch", "uvicorn", "fastapi"))


if __name__ == "__main__":
    main()
