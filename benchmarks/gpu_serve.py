"""Decoding with the engine, for benchmarks/gpu.py: plain steps beside compiled ones in CUDA graphs, in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.request import Request, Sampling


def serve(section: Any) -> None:
    """Plain first: what it says is what the compiled one is compared with."""
    sizes, device = section.sizes, section.device
    model = random_model(sizes.served, device)
    read, speed = bytes_per_step(model), bandwidth(device, sizes.copied)
    for batch in sizes.serve_batches:
        plain: list[list[int]] = []
        for compiled in (False, True):
            work = partial(serve_row, section, model, batch, compiled, read / speed, plain)
            section.row(f"decode, {batch} {'compiled' if compiled else 'plain'}", work, compiles=compiled)


def serve_row(
    section: Any, model: Any, batch: int, compiled: bool, least: float, plain: list[list[int]]
) -> dict[str, Any]:
    """least: seconds that reading the weights once takes."""
    prompt, tokens = section.sizes.serve_tokens
    found = decode(model, batch, prompt, tokens, compiled)
    step = found.rest / (tokens - 1)
    plain += [] if compiled else found.tokens
    same = [a == b for one, two in zip(plain, found.tokens, strict=True) for a, b in zip(one, two, strict=True)]
    return {
        "told": f"{step * 1e3:.2f} ms a step, {batch / step:.0f} tokens/s, {least / step:.1%} of bandwidth; first token "
        f"{found.first * 1e3:.0f} ms; start {found.start:.1f} s; {sum(same)} of {len(same)} tokens are plain's",
        "step_s": step,
        "tokens_per_s": batch / step,
        "share_of_bandwidth": least / step,
        "first_token_s": found.first,
        "start_s": found.start,
        "same_tokens": sum(same) / len(same),
    }


@dataclass
class Decoded:
    """What a run gave.

    Attributes:
        start: seconds from the model to the first engine that has answered a request, graphs of its sizes included.
        first: seconds from `batch` prompts to the first token of each.
        rest: seconds of all other tokens.
        tokens: of each text.
    """

    start: float
    first: float = 0.0
    rest: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)


def random_model(shape: Shape, device: torch.device) -> Decoder:
    """In bf16, drawn on the device."""
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    model.tie()
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def bytes_per_step(model: Decoder) -> int:
    """Of weights that a step reads: all but the embedding, of which it takes a row for each token."""
    embed = 0 if model.shape.tied or model.embed is None else model.embed.weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - embed


def decode(model: Decoder, batch: int, prompt: int, tokens: int, compiled: bool) -> Decoded:
    """Greedy texts of random prompts. What a first run, of the same sizes, takes is the start."""
    device, context = next(model.parameters()).device, prompt + tokens
    config = EngineConfig(
        compile=compiled, max_sequences=batch, step_tokens=max(512, 2 * batch), max_context=context, prefix_cache=False,
        cache_tokens=batch * (context + 16) // 16 * 16,
    )  # fmt: skip
    began = clock(device)
    engine = Engine(model, None, config)
    run(engine, batch, prompt, tokens)
    found = Decoded(clock(device) - began)
    found.first, found.rest, found.tokens = run(engine, batch, prompt, tokens)
    return found


def run(engine: Engine, batch: int, prompt: int, tokens: int) -> tuple[float, float, list[list[int]]]:
    numbers, device = torch.Generator().manual_seed(0), engine.runner.device
    texts: list[list[int]] = [[] for _ in range(batch)]
    began = clock(device)
    for number in range(batch):
        ids = torch.randint(engine.shape.vocab, (prompt,), generator=numbers).tolist()
        engine.add(Request(str(number), ids, Sampling(max_tokens=tokens)))
    first = began
    while engine.busy:
        for output in engine.step():
            texts[int(output.id)] += output.tokens
        if first == began and all(one.begun for one in engine.scheduler):
            first = clock(device)
    return first - began, clock(device) - first, texts


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of memory, by copying `size` bytes: read and written."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = clock(device)
        target.copy_(source)
        best = min(best, clock(device) - began)
    return 2 * size / best


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
