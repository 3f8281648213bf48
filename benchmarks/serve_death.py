"""Claim: a process of a cut model that is killed ends all streams with an error event well within a second, on every
protocol, and the model is back soon.

    python benchmarks/serve_death.py
    python benchmarks/serve_death.py --kills 3

The server is a process of its own, its model cut over two; the clients are in this one, on the same cores. Each time, one
stream of each protocol is in its middle when the second process gets SIGKILL. Taken from there: until each client has its
error event, and until the model is ready again; beside the time that loading it took at first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx

from common import ROOT, processes, spread, write

sys.path.insert(0, str(ROOT / "tests" / "system"))
from served import SHAPE, make_folder

from weft.serve.server.kserve.schema import MESSAGES

SIZES = {"num_layers": 4, "hidden": 256, "num_heads": 8, "num_kv_heads": 4, "ffn": 512, "max_seq": 65536}
TOKENS = 60000
Stream = Callable[[str, "Future[None]"], float]
"""Reads a stream of the server at an address, and says when its error came, on `time.monotonic`'s clock; the future is set
once the stream has begun."""


def event_stream(route: str, body: dict[str, Any]) -> Stream:
    def read(address: str, begun: Future[None]) -> float:
        with httpx.stream("POST", f"http://{address}{route}", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not begun.done():
                    begun.set_result(None)
                if line.startswith("data: {") and "error" in json.loads(line[6:]):
                    return time.monotonic()
        raise RuntimeError(f"{route}: the stream ended in silence")

    return read


def rpc_stream(address: str, begun: Future[None]) -> float:
    message = MESSAGES["ModelInferRequest"](model_name="tiny", id="a")
    message.parameters["text_input"].string_param = "abc"
    message.parameters["max_tokens"].int64_param = TOKENS
    message.parameters["ignore_eos"].bool_param = message.parameters["stream"].bool_param = True
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        for answer in call(iter([message.SerializeToString()]), timeout=60):
            if not begun.done():
                begun.set_result(None)
            if MESSAGES["ModelStreamInferResponse"].FromString(answer).error_message:
                return time.monotonic()
    raise RuntimeError("ModelStreamInfer: the stream ended in silence")


STREAMS: dict[str, Stream] = {
    "OpenAI completions": event_stream(
        "/v1/completions", {"prompt": "abc", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    ),
    "KServe generate_stream": event_stream(
        "/v2/models/tiny/generate_stream", {"text_input": "abc", "max_tokens": TOKENS, "ignore_eos": True}
    ),
    "KServe gRPC": rpc_stream,
}


def kill_once(server: subprocess.Popen[str], http: str, rpc: str) -> dict[str, float]:
    """Seconds from a kill to what follows."""
    with ThreadPoolExecutor(len(STREAMS)) as threads:
        begun = [Future[None]() for _ in STREAMS]
        ends = {
            name: threads.submit(read, rpc if read is rpc_stream else http, future)
            for (name, read), future in zip(STREAMS.items(), begun, strict=True)
        }
        for future in begun:
            future.result(60)
        time.sleep(0.2)
        killed = time.monotonic()
        *_, worker = processes(server.pid)  # of the server, its engine's process, and the one that that has begun
        os.kill(worker, signal.SIGKILL)
        found = {f"error event, {name}": end.result(60) - killed for name, end in ends.items()}
    time.sleep(0.5)  # until it is no longer ready for sure
    while httpx.get(f"http://{http}/health/ready").status_code != 200:
        time.sleep(0.02)
    return {**found, "ready again": time.monotonic() - killed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_folder(Path(folder) / "tiny", spread=0.02, shape=SHAPE.model_copy(update=SIZES))
        process = subprocess.Popen(
            [sys.executable, "-m", "weft", "serve", f"tiny={path}", "--port", "0", "--grpc-port", "0", "--tp", "2",
             "--device", "cpu", "--cache-tokens", "200000"],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            said = ""
            while not (at := re.search(r"KServe +http://(\S+)/v2 .* gRPC at (\S+)\n", said)):
                said += process.stdout.readline()
            loading = float(re.search(r"after ([\d.]+) s", said)[1])  # type: ignore[index]
            found = [kill_once(process, at[1], at[2]) for _ in range(arguments.kills)]
        finally:
            process.terminate()
            process.wait(60)
    results = {name: spread([one[name] for one in found]) for name in found[0]}
    results["loading at first"] = loading
    print(json.dumps(results, indent=2))
    write("serve_death", {"kills": arguments.kills, "seconds": results}, ("torch", "uvicorn", "fastapi", "grpcio"))


if __name__ == "__main__":
    main()
