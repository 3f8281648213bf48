"""What a protocol costs: one small model, asked by OpenAI's completions, and by KServe over HTTP and over gRPC.

    python benchmarks/serve_protocols.py
    python benchmarks/serve_protocols.py --tokens 64 --stream

The model is so small that what surrounds it is most of the work. Every protocol is asked by as little of a client as there
is: bodies are made beforehand, answers are read and not looked into. One process serves, with one thread for the model.

`cpu_ms` is the server's own processor time for a request: on a machine that others use too it says most. `latency_ms` is of
one request at a time, `requests_per_s` of `--concurrency` at once. Protocols take turns; spreads are of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import processes, shown, spread, write
from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.server.kserve.schema import MESSAGES, SERVICE

LETTERS = string.ascii_letters + string.digits + "Ġ"
SHAPE = Shape(family="llama", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, ffn=96, vocab=63, max_seq=1024)
PROMPT = "Whatever is asked has to be read first"

Ask = Callable[[], Awaitable[object]]


def make_model(folder: Path) -> None:
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(folder, SHAPE, torch.float32) as weights:
        for name, dims in stored_sizes(SHAPE).items():
            weights.write(Region.whole(name, dims), 0.3 * torch.randn(dims, generator=numbers) + ("norm" in name))
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def start_server(folder: Path) -> tuple[subprocess.Popen[str], str, str]:
    """The process, and where it speaks HTTP and gRPC."""
    command = [
        sys.executable,
        "-m",
        "weft",
        "serve",
        f"small={folder}",
        "--device",
        "cpu",
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    said = ""
    while not (found := re.search(r"KServe +http://(\S+)/v2 .* gRPC at (\S+)\n", said)):
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended: {said}")
        said += line
    return process, found[1], found[2]


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """Of the server and its engine's process."""
    stats = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in processes(process.pid)]
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def tensors(stream: bool, tokens: int) -> list[dict[str, Any]]:
    """The request's inputs, as their heads and bytes."""
    text = PROMPT.encode()
    found = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "raw": len(text).to_bytes(4, "little") + text},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1], "raw": np.int32(tokens).tobytes()},
    ]
    return found + [{"name": "stream", "datatype": "BOOL", "shape": [1], "raw": b"\x01"}] * stream


class Http:
    """Just enough of a client: connections that are kept, one request at a time on each."""

    def __init__(self, address: str) -> None:
        self.host, _, self.port = address.partition(":")
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def post(self, route: str, body: bytes, **headers: str) -> Ask:
        """A call that sends this and reads the whole answer."""
        lines = [f"POST {route} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        sent = "\r\n".join([*lines, "", ""]).encode() + body

        async def ask() -> None:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, int(self.port))
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{route}: {head!r}")
            if length := re.search(rb"\ncontent-length: (\d+)", head):
                await reader.readexactly(int(length[1]))
            else:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            self.idle.append((reader, writer))

        return ask

    async def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
            await writer.wait_closed()


def askers(http: Http, channel: grpc.aio.Channel, stream: bool, tokens: int) -> dict[str, Ask]:
    """One call of each protocol, that reads the whole answer."""

    openai = {"model": "small", "prompt": PROMPT, "max_tokens": tokens, "stream": stream, "temperature": 0}
    found = {
        "openai": http.post("/v1/completions", json.dumps(openai).encode(), content_type="application/json"),
        "kserve generate": http.post(
            f"/v2/models/small/generate{'_stream' * stream}",
            json.dumps({"text_input": PROMPT, "max_tokens": tokens}).encode(),
        ),
    }
    inputs = tensors(stream, tokens)
    raw = [one["raw"] for one in inputs]
    heads = [{name: value for name, value in one.items() if name != "raw"} for one in inputs]
    message = MESSAGES["ModelInferRequest"](
        model_name="small", inputs=heads, raw_input_contents=raw
    ).SerializeToString()
    if stream:
        bidi = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")

        async def ask_stream() -> None:
            call = bidi(iter([message]))
            async for _ in call:
                pass

        return found | {"kserve grpc": ask_stream}
    binary = [head | {"parameters": {"binary_data_size": len(one)}} for head, one in zip(heads, raw, strict=True)]
    text = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    found["kserve infer, binary"] = http.post(
        "/v2/models/small/infer", text + b"".join(raw), inference_header_content_length=str(len(text))
    )
    unary = channel.unary_unary(f"/{SERVICE}/ModelInfer")

    async def ask_unary() -> None:
        await unary(message)

    return found | {"kserve grpc": ask_unary}


async def latency(ask: Ask, count: int) -> float:
    """Median milliseconds of one request at a time."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await ask()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


async def rate(ask: Ask, count: int, concurrency: int) -> float:
    """Requests per second, so many at once."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await ask()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return count / (time.perf_counter() - start)


async def measure(process: subprocess.Popen[str], http: str, rpc: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {}
    client = Http(http)
    async with grpc.aio.insecure_channel(rpc) as channel:
        asks = askers(client, channel, options.stream, options.tokens)
        for turn in range(options.rounds + 1):  # the first round warms up
            for name in list(asks) if turn % 2 == 0 else list(asks)[::-1]:
                alone = await latency(asks[name], options.requests // 4)
                before = processor_seconds(process)
                together = await rate(asks[name], options.requests, options.concurrency)
                spent = 1000 * (processor_seconds(process) - before) / options.requests
                if turn:
                    row = found.setdefault(name, {"latency_ms": [], "requests_per_s": [], "cpu_ms": []})
                    for key, value in zip(row, (alone, together, spent), strict=True):
                        row[key].append(value)
    await client.close()
    return {name: {key: spread(values, 2) for key, values in row.items()} for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of a request")
    parser.add_argument("--stream", action="store_true", help="answers come token by token")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=400, help="of a protocol in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name) / "small"
        make_model(folder)
        process, http, rpc = start_server(folder)
        try:
            rows = asyncio.run(measure(process, http, rpc, options))
        finally:
            process.terminate()
            process.wait()
    for protocol, row in rows.items():
        print(f"{protocol:22}", "  ".join(f"{key} {value['median']:8.2f}" for key, value in row.items()))
    results = {
        "question": "what does a protocol cost, around the same model?",
        "prompt_bytes": len(PROMPT), **vars(options), "protocols": rows,
    }  # fmt: skip
    path = write(f"serve_protocols{'_stream' * options.stream}", results, ("torch", "grpcio", "uvicorn", "fastapi"))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
