"""weft's engine inside of NVIDIA's Triton against the same engine without it: the same model and requests, taking turns.

    python benchmarks/serve_triton.py                   # a small model, where what Triton adds is seen best
    python benchmarks/serve_triton.py --hidden 768 --layers 12 --vocab 50257

Directly: the requests are given to an EngineLoop of this process. In Triton: over gRPC, all on one stream of NVIDIA's
client, to a server that `weft serve-triton` started. Both stream every token. A ratio is Triton's seconds over the engine's
of neighbouring runs: 1 means that Triton costs nothing. First: the mean time to a request's first token, in milliseconds.

Seconds are the clock's, for several processes work. On a busy machine each hop between them waits for its turn; the ratio
of the quickest rounds is the nearest to what a quiet one would show.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as grpc

from common import alternate, shown, spread, write
from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder
from weft.export.triton.repository import export_triton
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.loop import EngineLoop
from weft.serve.requests.request import Output, Request, Sampling

Firsts = list[float]


def make_model(folder: Path, shape: Shape) -> Path:
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(folder, shape, torch.float32) as weights:
        for name, dims in stored_sizes(shape).items():
            weights.write(Region.whole(name, dims), 0.02 * torch.randn(dims, generator=numbers) + ("norm" in name))
    return folder


def directly(loop: EngineLoop, prompts: list[list[int]], num_tokens: int, firsts: Firsts) -> float:
    """Seconds until all requests have ended."""
    ended, left = threading.Event(), set(range(len(prompts)))
    start = time.perf_counter()

    def deliver(number: int, seen: list[int], output: Output) -> None:
        if not seen:
            firsts.append(time.perf_counter() - start)
        seen.extend(output.tokens)
        if output.finish is not None:
            assert len(seen) == num_tokens, (output, len(seen))
            left.remove(number)
            if not left:
                ended.set()

    sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        loop.submit(Request(str(number), prompt, sampling), partial(deliver, number, []))
    assert ended.wait(600)
    return time.perf_counter() - start


def in_triton(client: Any, answers: queue.Queue, prompts: list[list[int]], num_tokens: int, firsts: Firsts) -> float:
    """The same, over the client's stream."""
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        inputs = [grpc.InferInput("input_ids", [len(prompt)], "INT64"), grpc.InferInput("stream", [1], "BOOL"),
                  grpc.InferInput("max_tokens", [1], "INT32"), grpc.InferInput("ignore_eos", [1], "BOOL")]  # fmt: skip
        values = (np.array(prompt), np.array([True]), np.array([num_tokens], np.int32), np.array([True]))
        for tensor, value in zip(inputs, values, strict=True):
            tensor.set_data_from_numpy(value)
        client.async_stream_infer("model", inputs, request_id=str(number))
    counts: dict[str, int] = {}
    left = len(prompts)
    while left:
        result, error = answers.get(timeout=600)
        if error is not None:
            raise error
        id = result.get_response().id
        if id not in counts:
            firsts.append(time.perf_counter() - start)
        counts[id] = counts.get(id, 0) + len(result.as_numpy("output_ids"))
        left -= result.as_numpy("finish_reason") is not None
    assert set(counts.values()) == {num_tokens}, counts
    return time.perf_counter() - start


@contextmanager
def triton(repository: Path, *options: str) -> Iterator[tuple[Any, queue.Queue]]:
    """A client of a Triton that serves the repository, started with more options, and where its stream's answers come."""
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", "serve-triton", str(repository),
         *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *options)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("ready: "))
        address = re.search(r"gRPC ([\d.:]+)", line)
        assert address
        answers: queue.Queue = queue.Queue()
        client = grpc.InferenceServerClient(address[1])
        client.start_stream(lambda result, error: answers.put((result, error)))
        yield client, answers
        client.stop_stream()
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 256, "layers": 4, "vocab": 4096, "prompt": 32, "tokens": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    options = parser.parse_args()
    shape = Shape(
        family="gpt2", num_layers=options.layers, hidden=options.hidden, num_heads=options.hidden // 64,
        ffn=4 * options.hidden, vocab=options.vocab, max_seq=1024,
    )  # fmt: skip
    rows = []
    with TemporaryDirectory() as scratch:
        source = make_model(Path(scratch) / "source", shape)
        export_triton(source, Path(scratch) / "models", "model", link=True)
        # the prefix cache would answer the later rounds' prompts
        settings = Path(scratch) / "models/model/1/model.json"
        settings.write_text(settings.read_text().replace('"prefix_cache": true', '"prefix_cache": false'))
        loop = EngineLoop(Engine.load(source, EngineConfig(prefix_cache=False)))
        loop.start()
        with triton(Path(scratch) / "models") as (client, answers):
            for batch in options.batches:
                rows.append(compare(loop, client, answers, shape, batch, options))
                print(rows[-1], flush=True)
        loop.close()
    path = write(
        "serve_triton", {"model": shape.model_dump(exclude_none=True), "rows": rows}, ("torch", "tritonclient")
    )
    print(shown(path))


def compare(
    loop: EngineLoop, client: Any, answers: queue.Queue, shape: Shape, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    numbers = torch.Generator().manual_seed(batch)
    prompts = torch.randint(shape.vocab, (batch, options.prompt), generator=numbers).tolist()
    firsts: dict[str, Firsts] = {"engine": [], "triton": []}
    sides = {
        "engine": partial(directly, loop, prompts, options.tokens, firsts["engine"]),
        "triton": partial(in_triton, client, answers, prompts, options.tokens, firsts["triton"]),
    }
    for warm in sides.values():
        warm()
        warm()
    for found in firsts.values():
        found.clear()
    seconds = alternate(sides, options.rounds)
    ratios = [theirs / ours for ours, theirs in zip(seconds["engine"], seconds["triton"], strict=True)]
    tokens = batch * options.tokens
    return {
        "requests": batch,
        "ratio": spread(ratios),
        "ratio_of_quickest": round(min(seconds["triton"]) / min(seconds["engine"]), 3),
        "tokens_per_second": {side: spread([tokens / one for one in found], 1) for side, found in seconds.items()},
        "first_ms": {side: round(1e3 * sum(found) / len(found), 2) for side, found in firsts.items()},
    }


if __name__ == "__main__":
    main()
