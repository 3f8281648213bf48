"""What `weft export triton --backend vllm` writes, in the real Triton, with NVIDIA's own code for vLLM.

The repository has two models: one with an adapter, one cut over two processes. Texts, whole, streamed, all at once and
with the adapter, are held against those of vLLM alone and of weft's engine; texts that end early, requests that cannot be,
and one that is left, are sent as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import ROOT
from exported_sides import FOR_VLLM, TOKENS, ask_vllm, ask_weft, vllm_told
from weft.export.triton.repository import export_triton
from weft.serve.folder import find_model
from weft.serve.triton.process import Addresses

sys.path.insert(0, str(ROOT / "tests" / "system"))
from served import make_adapter

Table = dict[str, Any]

PROMPTS = ("import os", "def f(x):\n    return", "class A", "self.", "for i in range(", "# the")
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
SECONDS = 300

START = """
import os, sys
from weft.serve.triton.home import find_home
home = find_home()
folder, repository, code, http, grpc, metrics = sys.argv[1:]
os.symlink(home.backends / "python", folder + "/python")
os.symlink(code, folder + "/vllm")
words = [str(home.binary), "--model-repository=" + repository, "--backend-directory=" + folder, "--http-port=" + http,
         "--grpc-port=" + grpc, "--metrics-port=" + metrics, "--pinned-memory-pool-byte-size=0"]
os.execve(home.binary, words, {**os.environ, **home.env})
"""
"""Run by the Python that has vLLM, so that Triton's stub looks through to its environment."""


class Client:
    """Of one Triton."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, model: str, prompt: str, **parameters: Any) -> Table:
        body = {
            "text_input": prompt, "exclude_input_in_output": True, "return_finish_reason": True,
            "sampling_parameters": json.dumps(GREEDY | parameters),
        }  # fmt: skip
        request = urllib.request.Request(f"{self.url}/v2/models/{model}/generate", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def text(self, model: str, prompt: str, **parameters: Any) -> str:
        return str(self.ask(model, prompt, **parameters).get("text_output"))

    def open(self, model: str, prompt: str, **parameters: Any) -> Any:
        """A stream."""
        body = {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(GREEDY | parameters)}
        request = urllib.request.Request(f"{self.url}/v2/models/{model}/generate_stream", json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=SECONDS)

    def streamed(self, model: str, prompt: str) -> list[str]:
        with self.open(model, prompt) as answer:
            lines = [line.decode().removeprefix("data:") for line in answer if line.strip()]
        return [json.loads(line)["text_output"] for line in lines]


@contextmanager
def triton(python: str, code: Path, repository: Path, folder: Path) -> Iterator[tuple[Client, Path]]:
    """It, once its models are ready, and its log.

    Raises:
        ValueError: it ended before, or is not ready in time.
    """
    backends, log = folder / "backends", folder / "log"
    backends.mkdir()
    addresses = Addresses("127.0.0.1", 0, 0, 0).found()
    ports = [str(port) for port in (addresses.http, addresses.grpc, addresses.metrics)]
    words = [python, "-c", START, str(backends), str(repository), str(code.resolve()), *ports]
    environment = os.environ | FOR_VLLM | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT / "src")}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    try:
        url = f"http://127.0.0.1:{addresses.http}"
        deadline = time.monotonic() + SECONDS
        while not ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"Triton is not ready:\n{log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(1)
        yield Client(url), log
    finally:
        process.terminate()
        process.wait()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def serve_and_compare(options: argparse.Namespace, folder: Path) -> Table:
    folder.mkdir()
    source, _ = find_model(options.model)
    make_adapter(source, folder / "tuned", folder / "merged", seed=1)
    repository = folder / "models"
    for name, how in {"whole": {"adapters": {"tuned": folder / "tuned"}}, "cut": {"tp": 2}}.items():
        export_triton(source, repository, name, "vllm", **how)
    sides: dict[str, list[list[str]]] = {}
    for name, adapters in {"plain": {}, "tuned": {"tuned": str(folder / "tuned")}}.items():
        for_vllm = folder / name / "vllm"
        for_vllm.mkdir(parents=True)
        (for_vllm / "model").symlink_to(repository / "whole/1/weights")
        (for_vllm / "dtype").write_text("float32", encoding="utf-8")
        (for_vllm / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
        if adapters:
            (for_vllm / "adapter").symlink_to(folder / "tuned")
        ask_vllm(options.python, [for_vllm], options.log)
        sides[name] = [vllm_told(for_vllm)["texts"], ask_weft(source, PROMPTS, torch.float32, adapters)["texts"]]
    with triton(options.python, options.triton_backend, repository, folder) as (client, log):
        texts = {
            "whole": (sides["plain"], [client.text("whole", prompt) for prompt in PROMPTS]),
            "streamed": (sides["plain"], ["".join(client.streamed("whole", prompt)) for prompt in PROMPTS]),
            "with an adapter": (
                sides["tuned"],
                [client.text("whole", prompt, lora_name="tuned") for prompt in PROMPTS],
            ),
            "cut over two": (sides["plain"], [client.text("cut", prompt) for prompt in PROMPTS]),
        }
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            texts["all at once"] = (
                sides["plain"],
                list(pool.map(lambda prompt: client.text("whole", prompt), PROMPTS)),
            )
        found: Table = {"prompts": len(PROMPTS), "same": {}}
        for name, ((vllms, wefts), tritons) in texts.items():
            found["same"][name] = {"as vLLM": equal(tritons, vllms), "as weft": equal(tritons, wefts)}
        found["ends"] = ends(client, sides["plain"][1][0])
        found["refused"] = {
            name: client.ask("whole", PROMPTS[0], **bad).get("error")
            for name, bad in {"value": {"temperature": -1}, "name": {"heat": 1}, "adapter": {"lora_name": "x"}}.items()
        }
        found["cancelled"] = cancelled(client, log)
        found["the same afterwards"] = client.text("whole", PROMPTS[0]) == sides["plain"][1][0]
    return found


def equal(some: list[str], others: list[str]) -> int:
    return sum(one == two for one, two in zip(some, others, strict=True))


def ends(client: Client, text: str) -> Table:
    """A text that stops at half of itself, and one whose every token is the end token, 0."""
    half = text[len(text) // 2 :][:4]
    stopped = client.ask("whole", PROMPTS[0], stop=[half])
    ended = client.ask("whole", PROMPTS[0], allowed_token_ids=[0], ignore_eos=False)
    return {
        "stop text": [stopped["text_output"] == text[: text.index(half)], stopped["finish_reason"]],
        "end token": [ended["text_output"] == "", ended["finish_reason"]],
    }


def cancelled(client: Client, log: Path) -> bool:
    """Whether a stream that is left after its first piece is ended, in NVIDIA's words."""
    with client.open("whole", PROMPTS[0], max_tokens=120) as answer:
        answer.readline()
    for _ in range(20):
        if "Successfully cancelled the request" in log.read_text(encoding="utf-8"):
            return True
        time.sleep(0.5)
    return False


if __name__ == "__main__":
    raise SystemExit("python benchmarks/exported_vllm.py --triton-backend … runs it")
