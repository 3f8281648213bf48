"""Generation against transformers: the same weights, the same prompts, in one run, taking turns.

    python benchmarks/generate.py                 # GPT-2 124M, random weights; about three minutes on a CPU
    python benchmarks/generate.py --device cuda

A ratio is transformers' seconds over weft's of one pair of neighbouring runs: above 1, weft is faster. Of all pairs the
median, the smallest and the largest are written. Prefill is the time to the first new token, decode that of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from weft.serve.sampling import Sampling

from weft import __version__
from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape
from weft.serve.generate import Generation

GPT2 = Shape(family="gpt2", num_layers=12, hidden=768, num_heads=12, ffn=3072, vocab=50257, max_seq=1024)
RESULTS = Path(__file__).parent / "results" / "generate.json"

Timing = tuple[float, float, list[list[int]]]  # seconds to the first token, seconds for the others, new tokens


def by_weft(model: Decoder, prompts: list[list[int]], num_tokens: int, wait: Callable[[], None]) -> Timing:
    start = time.perf_counter()
    batch = Generation(model, prompts, Sampling(max_tokens=num_tokens))
    tokens: list[list[int]] = [[] for _ in prompts]
    first = 0.0
    while batch.rows:
        for index, token in batch.step():
            tokens[index].append(token)
        first = first or time.perf_counter() - start
    wait()
    return first, time.perf_counter() - start - first, tokens


class Clock(transformers.generation.streamers.BaseStreamer):
    """The time at which transformers hands over the first new tokens."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(time.perf_counter())  # the prompt first; new tokens are on the CPU by now

    def end(self) -> None:
        pass


def by_transformers(model: Any, prompts: list[list[int]], num_tokens: int, wait: Callable[[], None]) -> Timing:
    clock = Clock()
    start = time.perf_counter()
    ids = torch.tensor(prompts, device=model.device)
    both = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
        streamer=clock,
    )  # fmt: skip
    tokens = both[:, ids.shape[1] :].tolist()
    wait()
    end = time.perf_counter()
    return clock.puts[1] - start, end - clock.puts[1], tokens


def spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)
    }  # fmt: skip


def compare(folder: Path, device: torch.device, dtype: torch.dtype, batch: int, options: argparse.Namespace) -> dict:
    """One row of the table."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    _, model = load_decoder(folder, device, dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    numbers = torch.Generator().manual_seed(batch)
    prompts = torch.randint(GPT2.vocab, (batch, options.prompt), generator=numbers).tolist()
    ours, theirs = [], []
    for turn in range(options.pairs + 1):  # the first pair warms up
        runs = [lambda: ours.append(by_weft(model, prompts, options.tokens, wait))]
        runs.append(lambda: theirs.append(by_transformers(reference, prompts, options.tokens, wait)))
        for run in runs if turn % 2 else reversed(runs):
            run()
    ours, theirs = ours[1:], theirs[1:]
    decoded = batch * (options.tokens - 1)
    equal = [
        a == b for mine, other in zip(ours[0][2], theirs[0][2], strict=True) for a, b in zip(mine, other, strict=True)
    ]
    row = {"dtype": str(dtype).removeprefix("torch."), "batch": batch}
    for name, timings in (("weft", ours), ("transformers", theirs)):
        prefill, decode = (statistics.median(timing[part] for timing in timings) for part in (0, 1))
        row[f"{name}_prefill_tokens_per_s"] = round(batch * options.prompt / prefill, 1)
        row[f"{name}_decode_tokens_per_s"] = round(decoded / decode, 1)
    for part, name in enumerate(("prefill", "decode")):
        row[f"{name}_ratio"] = spread([other[part] / mine[part] for mine, other in zip(ours, theirs, strict=True)])
    row["equal_tokens"] = round(sum(equal) / len(equal), 4)
    return row


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; one is steadiest on a machine that is shared"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=17, help="new tokens of each")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with TemporaryDirectory() as name:
        config = transformers.AutoConfig.for_model(**config_from_shape(GPT2))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(name)
        for dtype in (torch.float32, torch.bfloat16):
            for batch in (1, 8):
                rows.append(compare(Path(name), device, dtype, batch, options))
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "question": "how fast does weft generate, next to transformers' generate with the same weights?",
        "command": " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "machine": machine(device),
        "versions": {
            "weft": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": "GPT-2 124M, random weights",
        "prompt_tokens": options.prompt,
        "new_tokens": options.tokens,
        "pairs": options.pairs,
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
