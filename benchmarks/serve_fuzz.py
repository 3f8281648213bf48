"""Claim: nonsense on every route and method crashes nothing, gets no 5xx, and leaves the memory as it was.

    python benchmarks/serve_fuzz.py
    python benchmarks/serve_fuzz.py --requests 2000 --seed 7

Requests are made of a grammar: valid bodies in which fields are replaced, left out, doubled, made huge or deep, or whole
bodies of bytes; each a function of the seed and its number, so one that fails can be sent again. A fifth of them goes over
gRPC: messages likewise, and likewise bytes of which some were changed; there, INTERNAL and the like are what 5xx is. Among
them, every 50th is a good one, whose answer must be the same each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import httpx

from common import ROOT, processes, write

sys.path.insert(0, str(ROOT / "tests" / "system"))
from served import Served, config, make_folder, model

from weft.serve.server.kserve.schema import HEALTH, MESSAGES, SERVICE

GOOD = {"prompt": "good", "max_tokens": 4, "temperature": 0}
GOOD_EVERY = 50
MEMORY_EVERY = 1000

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "a", "\x00", "é\U0001f600", "a" * 3000, [],
    {}, [[]], [None], [0], [1, 2, 3], [-1], [10**12], ["a", "b"], ["a"] * 300, [[1], [2]], {"a": {"b": {"c": []}}},
    "{{ 7*7 }}", "<|end|><|turn|>", "../../etc/passwd", "'; DROP TABLE", "\u202e\ufdd0", "auto", "required", "text",
]  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 1.0, "top_p": 0.9, "n": 1, "stream": False,
        "logprobs": 1, "echo": True, "stop": ["x"], "seed": 1, "best_of": 1, "logit_bias": {"3": 1}, "suffix": None,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "stream_options": {"include_usage": True}, "user": "u",
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 1,
        "prompt_logprobs": 1, "priority": 1, "cache_salt": "s", "timeout": 5, "return_token_ids": True,
        "guided_choice": ["a", "b"], "guided_regex": "[ab]{2}", "guided_json": {"type": "boolean"},
        "structured_outputs": {"regex": "a|b"}, "response_format": {"type": "json_object"},
    },
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 1.0, "n": 1,
        "stream": True, "logprobs": True, "top_logprobs": 2, "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto", "parallel_tool_calls": False, "max_completion_tokens": 3, "chat_template_kwargs": {"a": 1},
        "add_generation_prompt": True, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
    },
    "/v1/embeddings": {"model": "tiny", "input": "abc", "encoding_format": "base64", "dimensions": 32},
    "/v2/models/tiny/generate": {
        "text_input": "abc", "max_tokens": 3, "id": "a", "stop": ["x"], "logprobs": 1, "temperature": 1.0, "top_k": 5,
        "regex": "[ab]{2}", "json_schema": '{"type": "boolean"}', "parameters": {"seed": 1, "timeout": 10**6},
    },
    "/v2/models/tiny/generate_stream": {"input_ids": [1, 2], "max_tokens": 3, "stream": True, "stop_token_ids": [5]},
    "/v2/models/tiny/infer": {
        "id": "a", "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["abc"]},
                              {"name": "top_p", "datatype": "FP32", "shape": [1], "data": [0.5]}],
        "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}, {"name": "output_ids"}],
        "parameters": {"max_tokens": 3, "binary_data_output": True},
    },
    "/v2/repository/index": {"ready": True},
    "/v2/repository/models/tiny/unload": {"parameters": {"unload_dependents": False}},
    "/tokenize": {"model": "tiny", "prompt": "abc", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"model": "tiny", "tokens": [1, 2, 3]},
}  # fmt: skip
NEEDED = {
    "/v1/completions": ["prompt", "max_tokens"], "/v1/chat/completions": ["messages", "max_tokens"],
    "/v1/embeddings": ["input"], "/v2/models/tiny/generate": ["text_input", "max_tokens"], "/v2/repository/index": [],
    "/v2/models/tiny/generate_stream": ["input_ids", "max_tokens"], "/v2/models/tiny/infer": ["inputs", "parameters"],
    "/v2/repository/models/tiny/unload": [], "/tokenize": ["prompt"], "/detokenize": ["tokens"],
}  # fmt: skip
OTHERS = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/v1/models/%2e%2e/x"), ("GET", "/health"),
    ("GET", "/metrics"), ("GET", "/health/generate"), ("GET", "/health/live"), ("POST", "/health"), ("GET", "/docs"),
    ("DELETE", "/v1/models/tiny"), ("GET", "/openapi.json"), ("PUT", "/v1/completions"), ("GET", "/v1/completions"),
    ("GET", "/v2"), ("GET", "/v2/models/tiny/versions/x"), ("GET", "/v2/models/tiny/stats"), ("GET", "/v2/models/a/config"),
    ("POST", "/v2/systemsharedmemory/region/a/register"), ("OPTIONS", "/"), ("GET", "/a" * 2000),
]  # fmt: skip
RPC_SHARE = 0.2
METHODS = {
    f"/{SERVICE}/{name.removesuffix('Request')}": name
    for name in MESSAGES
    if name.endswith("Request") and not name.startswith("HealthCheck")
} | {f"/{SERVICE}/ModelStreamInfer": "ModelInferRequest", f"/{HEALTH}/Check": "HealthCheckRequest"}
BROKEN = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"}
"""Codes that are not the client's fault. UNIMPLEMENTED is."""


def make_call(seed: int, number: int) -> tuple[str, list[bytes]] | None:
    """Method and messages of a request over gRPC; None: this number's goes over HTTP."""
    chance = random.Random(f"rpc {seed}:{number}")
    if chance.random() >= RPC_SHARE:
        return None
    infers = [method for method, name in METHODS.items() if name == "ModelInferRequest"]
    method = chance.choice(infers if chance.random() < 0.7 else [*METHODS, f"/{SERVICE}/SystemSharedMemoryRegister"])
    kind = METHODS.get(method, "ModelReadyRequest")
    count = chance.randrange(1, 5) if method.endswith("ModelStreamInfer") else 1
    return method, [bend_bytes(chance, make_message(chance, kind)) for _ in range(count)]


def make_message(chance: random.Random, kind: str) -> bytes:
    message, fields = MESSAGES[kind](), MESSAGES[kind].DESCRIPTOR.fields_by_name
    for name in ("name", "model_name"):
        if name in fields and chance.random() < 0.9:
            setattr(message, name, chance.choice(["tiny", "tiny", "tiny", "", "../x", "a" * 3000]))
    if kind != "ModelInferRequest":
        return bytes(message.SerializeToString())
    settings = FIELDS["/v2/models/tiny/generate"] | {"text_input": "abc", "max_tokens": 3, "stream": True}
    for name in {"text_input", "max_tokens", *chance.sample(sorted(settings), chance.randrange(4))}:
        put(message.parameters[name], chance.choice(VALUES) if chance.random() < 0.2 else settings[name])
    if chance.random() < 0.3:
        put(message.parameters[chance.choice(["unknown", "sequence_id", "priority", "timeout"])], chance.choice(VALUES))
    for _ in range(chance.choice([0, 0, 0, 1, 2, 100])):
        tensor = message.inputs.add(name=chance.choice(["input_ids", "top_p", "stop", "x"]))
        tensor.datatype = chance.choice(["INT64", "FP32", "BYTES", "BOOL", "X"])
        tensor.shape.extend(chance.choice([[1], [2], [], [-1], [2**62, 2], [0], [1, 1]]))
        tensor.contents.int64_contents.extend(chance.choice([[], [1], [1, 2], [-(2**63)], [10**9] * 100]))
    for _ in range(chance.choice([0, 0, 0, 1])):
        message.raw_input_contents.append(chance.randbytes(chance.choice([0, 4, 8, 16, 3000])))
    for _ in range(chance.choice([0, 0, 1])):
        message.outputs.add(name=chance.choice(["text_output", "output_ids", "x"]))
    return bytes(message.SerializeToString())


def put(parameter: Any, value: Any) -> None:
    """A value of JSON as a parameter: as it is, where it can be."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and abs(value) < 2**63:
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = (
            (value if isinstance(value, str) else json.dumps(value)).encode(errors="replace").decode()
        )


def bend_bytes(chance: random.Random, data: bytes) -> bytes:
    """Mostly as it is; or with some bytes changed, cut off, or others altogether."""
    way = chance.random()
    if way < 0.6 or not data:
        return data
    if way < 0.65:
        return chance.randbytes(chance.choice([0, 1, 50, 5000]))
    bent = bytearray(data[: chance.randrange(len(data))] if way < 0.75 else data)
    for _ in range(min(len(bent), chance.randrange(1, 5))):
        bent[chance.randrange(len(bent))] = chance.randrange(256)
    return bytes(bent)


async def call(channel: grpc.aio.Channel, method: str, messages: list[bytes]) -> tuple[str, str]:
    """gRPC's status, and what went wrong inside of a stream, if anything has that should not."""
    try:
        if not method.endswith("ModelStreamInfer"):
            await channel.unary_unary(method)(messages[0], timeout=120)
            return "OK", ""
        stream = channel.stream_stream(method)(iter(messages), timeout=120)
        async for data in stream:
            told = MESSAGES["ModelStreamInferResponse"].FromString(data).error_message
            if "internal error" in told or "engine failed" in told:
                return "OK", told
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def make_request(seed: int, number: int) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Method, route, body and headers of one request."""
    chance = random.Random(f"{seed}:{number}")
    if chance.random() < 0.08:
        method, path = chance.choice(OTHERS)
        return method, path, None, {}
    route = chance.choice(list(FIELDS))
    headers = {"content-type": "application/json"}
    if chance.random() < 0.05:
        headers["content-type"] = chance.choice(
            ["text/plain", "", "application/json; charset=utf-16", "multipart/form-data"]
        )
    if route.startswith("/v2/") and chance.random() < 0.1:
        headers["inference-header-content-length"] = str(chance.choice([0, 1, 50, 10**9, -1, "x"]))
    if chance.random() < 0.05:
        headers["x-request-timeout"] = chance.choice(["0", "-1", "nan", "inf", "1e-9", "x", "3"])
    if chance.random() < 0.05:
        size = chance.choice([0, 1, 50, 5000])
        return "POST", route, chance.choice([chance.randbytes(size), b"[" * size, b'{"a":' * size]), headers
    fields = FIELDS[route]
    names = set(NEEDED[route]) | set(chance.sample(sorted(fields), chance.randrange(min(6, len(fields)))))
    body = {name: fields[name] for name in sorted(names)}
    for _ in range(chance.randrange(3)):
        name = chance.choice([*sorted(fields), "unknown"])
        body[name] = bend(chance, fields.get(name))
    if body and chance.random() < 0.1:
        body.pop(chance.choice(sorted(body)), None)
    text = json.dumps(body, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.05:
        text = (
            text[: chance.randrange(len(text))]
            + chance.choice(['"', "}", "\\ud800", "NaN", ""])
            + text[len(text) // 2 :]
        )
    return "POST", route, text.encode("utf-8", "surrogatepass"), headers


def bend(chance: random.Random, value: Any) -> Any:
    """Another value in a field's place: any, or the same with a part replaced."""
    if isinstance(value, dict) and value and chance.random() < 0.5:
        name = chance.choice(sorted(value))
        return {**value, name: bend(chance, value[name])}
    if isinstance(value, list) and value and chance.random() < 0.5:
        return [bend(chance, value[0]), *value[1:]] * chance.choice([1, 2, 40])
    if chance.random() < 0.05:
        deep: Any = []
        for _ in range(chance.choice([10, 150, 900])):
            deep = [deep]
        return deep
    return chance.choice(VALUES)


async def fuzz(url: str, rpc: str, requests: int, seed: int, clients: int = 16) -> dict[str, Any]:
    """Send them; what came back, by status, and what should not have.

    Args:
        url, rpc: addresses of HTTP and gRPC.
    """
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    memory: list[float] = []
    good: set[str] = set()
    numbers = iter(range(requests))
    start = time.monotonic()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http, grpc.aio.insecure_channel(rpc) as channel:
            for number in numbers:
                if number % GOOD_EVERY == 0:
                    answer = await http.post("/v1/completions", json=GOOD)
                    if answer.status_code == 200:
                        good.add(answer.json()["choices"][0]["text"])
                    elif answer.status_code != 429:
                        failures.append(f"a good request got {answer.status_code}")
                if number % MEMORY_EVERY == 0:
                    memory.append(resident())
                if (over_rpc := make_call(seed, number)) is not None:
                    code, told = await call(channel, *over_rpc)
                    statuses[f"gRPC {code}"] += 1
                    if code in BROKEN or (code == "OK" and told):
                        failures.append(f"request {number} ({over_rpc[0]}): {code} {told[:300]}")
                    continue
                method, path, body, headers = make_request(seed, number)
                try:
                    answer = await http.request(method, path, content=body, headers=headers)
                except httpx.HTTPError as error:
                    failures.append(f"request {number} ({method} {path}): {error!r}")
                    continue
                statuses[str(answer.status_code)] += 1
                if answer.status_code >= 500 or b'"server_error"' in answer.content:
                    failures.append(f"request {number} ({method} {path}): {answer.status_code} {answer.text[:300]}")

    await asyncio.gather(*(client() for _ in range(clients)))
    if len(good) > 1:
        failures.append(f"good requests got {len(good)} answers")
    memory.append(resident())
    return {
        "requests": requests, "seed": seed, "statuses": dict(sorted(statuses.items())), "failures": failures[:20],
        "num_failures": len(failures), "resident_mib": [round(one, 1) for one in memory],
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def resident() -> float:
    """MiB of this process, which is server and clients, and of the engine's and its helpers; where /proc is not, the peak
    of this one."""
    if not Path("/proc/self/status").is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = [
        line.split()
        for pid in processes(os.getpid())
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return sum(int(words[1]) for words in lines) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Served(
            config(model(make_folder(Path(folder) / "tiny"), max_waiting=64), grpc_port=0, apart=True)
        ).start()
        try:
            result = asyncio.run(fuzz(server.url, f"127.0.0.1:{server.grpc_port}", arguments.requests, arguments.seed))
            result["restarts"] = server.catalogue.models["tiny"].restarts
            result["cache_used_at_the_end"] = server.catalogue.models["tiny"].current.desk.stats().cache_used
        finally:
            server.stop()
    print(json.dumps(result, indent=2))
    if arguments.requests >= 1000:
        write("serve_fuzz", result, ("torch", "fastapi", "uvicorn", "grpcio"))
    sys.exit(bool(result["num_failures"] or result["restarts"]))


if __name__ == "__main__":
    main()
