"""The engine, for benchmarks/gpu.py: its texts against a CPU's; attention over the cache; decoding, plain steps beside
compiled ones in CUDA graphs, and transformers' `generate`, in the same run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from weft.models.attention import attend
from weft.models.decoder import Decoder
from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.kernels import gpu_attention
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps.store import Store

TEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "graphs": {"compile": True},
    "graphs, untold": {"compile": True},
    "int8 cache": {"cache_dtype": "int8"},
    "speculation": {"draft_tokens": 4},
    "graphs, speculation": {"compile": True, "draft_tokens": 4},
    "prompts in parts": {"step_tokens": 24, "max_sequences": 8},
    "a cache too small": {"cache_tokens": 640},
    "a cache too small, graphs": {"cache_tokens": 640, "compile": True},
    "invariant": {"invariant": True},
}
"""Ways in which the engine computes what it computes. Untold: no log-probabilities; it may go ahead."""
FEW = ("plain", "graphs", "graphs, untold", "int8 cache")
"""Of these, those of models that are not Llama's, and of lower precisions."""
EXACT = 2e-4
"""How far log-probabilities in fp32 may be from the CPU's. In others, twice what a CPU is from itself in fp32."""


def serve(section: Any) -> None:
    """Plain first: what it says is what the compiled one is compared with."""
    texts(section)
    sizes, device = section.sizes, section.device
    speed = bandwidth(device, sizes.copied)
    for sequences, tokens in sizes.contexts:
        for how in ("in place", "gathered"):
            work = partial(attention_row, section, sequences, tokens, how, speed)
            section.row(f"attention, {sequences} × {tokens} {how}", work)
    # in fp32 where it is rehearsed: in bf16 tokens tie nearly, and each kernel may say another
    model = random_model(sizes.served, device, torch.float32 if section.tiny else torch.bfloat16)
    read = bytes_per_step(model)
    for batch in sizes.serve_batches:
        plain: list[list[int]] = []
        for compiled in (False, True):
            work = partial(serve_row, section, model, batch, compiled, read / speed, plain)
            section.row(f"decode, {batch} {'compiled' if compiled else 'plain'}", work, compiles=compiled)
    del model
    for batch in sizes.serve_batches[:-1]:
        for compiled in (False, True):
            work = partial(peer_row, section, batch, compiled, read / speed)
            section.row(f"transformers, {batch} {'compiled' if compiled else 'plain'}", work, compiles=compiled)


# -- texts ------------------------------------------------------------------------------------------------------------


def texts(section: Any) -> None:
    """Greedy texts of small models, and the log-probability of each token, against plain steps on the CPU in fp32."""
    for family, shape in section.sizes.told.items():
        model = random_model(shape, torch.device("cpu"), torch.float32)
        for weight in model.parameters():
            if weight.dim() > 1:  # no two tokens nearly tie
                weight.normal_(std=0.15, generator=torch.Generator().manual_seed(weight.numel()))
        for dtype in (torch.float32,) if section.tiny or family != "llama" else (torch.float32, torch.bfloat16):
            for name, settings in TEXTS.items():
                if settings.get("compile") and section.tiny:
                    continue
                if name not in FEW and (family, dtype) != ("llama", torch.float32):
                    continue
                if "untold" in name and dtype != torch.float32:
                    continue  # nearly tied tokens make other texts, and there is nothing else to compare
                work = partial(texts_row, section, model, dtype, settings, told="untold" not in name)
                section.row(f"texts, {family} {str(dtype)[6:]}, {name}", work, compiles="compile" in settings)


Spoken = dict[str, list[tuple[int, float]]]


def spoken(model: Decoder, settings: dict[str, Any], told: bool = True) -> Spoken:
    """The tokens of eight texts of different lengths, with their log-probabilities (not told: nan)."""
    engine = Engine(model, None, EngineConfig(**{"max_sequences": 8, "step_tokens": 128} | settings))
    longest, numbers = engine.shape.max_seq, torch.Generator().manual_seed(1)
    for number in range(8):
        length = 1 + number * longest // 20
        ids = torch.randint(engine.shape.vocab, (length,), generator=numbers).tolist()
        engine.add(Request(str(number), ids, Sampling(max_tokens=longest // 8 + number), logprobs=0 if told else None))
    found: Spoken = {}
    while engine.busy:
        for output in engine.step():
            logprobs = [one.logprob for one in output.logprobs or ()] or [math.nan] * len(output.tokens)
            found.setdefault(output.id, []).extend(zip(output.tokens, logprobs, strict=True))
    engine.close()
    return found


def texts_row(
    section: Any, model: Decoder, dtype: torch.dtype, settings: dict[str, Any], *, told: bool
) -> dict[str, Any]:
    """Log-probabilities are compared up to the first token that is another."""
    expected = spoken(model, {"compile": False})
    near = EXACT
    if dtype != torch.float32 or "cache_dtype" in settings:
        rounded = {name: value for name, value in settings.items() if name == "cache_dtype"} | {"compile": False}
        near = 2 * compared(expected, spoken(copy.deepcopy(model).to(dtype), rounded))[1]
    there = random_model(model.shape, section.device, dtype)
    there.load_state_dict(model.state_dict())
    apart, largest = compared(expected, spoken(there, {"compile": False} | settings, told))
    right = largest <= near and not (apart and near == EXACT)
    return {
        "told": f"{'right' if right else 'WRONG'}; {len(expected) - apart} of {len(expected)} texts are the CPU's, "
        f"log-probabilities within {largest:.1e} of {near:.1e}",
        "right": right,
        "texts": len(expected),
        "other": apart,
        "largest": largest,
        "bound": near,
    }


def compared(expected: Spoken, found: Spoken) -> tuple[int, float]:
    """How many texts are others, and the largest difference of a log-probability before they are."""
    apart, largest = 0, 0.0
    for text, tokens in expected.items():
        for (token, logprob), (other, near) in zip(tokens, found[text], strict=True):
            if token != other:
                apart += 1
                break
            largest = largest if math.isnan(near) else max(largest, abs(logprob - near))
    return apart, largest


# -- attention --------------------------------------------------------------------------------------------------------


def attention_row(section: Any, sequences: int, tokens: int, how: str, speed: float) -> dict[str, Any]:
    """One token of each sequence over the paged cache: where the blocks lie, and gathered for torch's attention."""
    shape, device, block = section.sizes.served, section.device, 16
    each = tokens // block
    stores = [
        Store(sequences * each, block, shape.num_kv_heads, [shape.head_dim], fresh(1, device=device)) for _ in "kv"
    ]
    for store in stores:
        store.rows.normal_()
    q = fresh(1, sequences, shape.num_heads, shape.head_dim, device=device).transpose(1, 2)
    tables = torch.randperm(sequences * each, device=device).view(sequences, each)
    mask = fresh(sequences, 1, 1, tokens, device=device).zero_()
    mask[:, :, :, tokens - 3 :] = float("-inf")
    ones = torch.tensor([[number, number, 1, tokens - 4] for number in range(sequences)], device=device)
    tiles = gpu_attention.Tiles(ones, ones[:0], tables, tokens, None)

    def gathered() -> torch.Tensor:
        keys, values = (store.take(tables) for store in stores)
        heads = q.reshape(shape.num_kv_heads, -1, sequences, shape.head_dim).permute(2, 0, 1, 3)
        return attend(heads, keys, values, mask).permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(0)

    def in_place() -> torch.Tensor:
        keys, values = (store.rows for store in stores)
        if device.type != "cuda":
            return gathered()
        return gpu_attention.attend(q, keys, values, tiles)

    work = {"in place": in_place, "gathered": gathered}[how]
    with torch.inference_mode():
        apart = float((work().float() - gathered().float()).norm() / gathered().float().norm())
        seconds = replayed(work, device, section.sizes.steps)
    read = 2 * sequences * tokens * shape.num_kv_heads * shape.head_dim * q.itemsize
    return {
        "told": f"{seconds * 1e6:.0f} µs, {read / seconds / speed:.1%} of bandwidth; {apart:.1e} from torch's",
        "seconds": seconds,
        "share_of_bandwidth": read / seconds / speed,
        "apart": apart,
    }


def replayed(work: Callable[[], torch.Tensor], device: torch.device, times: int) -> float:
    """Seconds of one, as in a CUDA graph: launching is not in it."""
    if device.type != "cuda":
        began = clock(device)
        work()
        return clock(device) - began
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        work()
    torch.cuda.synchronize()
    graph, many = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        for _ in range(many):
            work()
    best = float("inf")
    for _ in range(times):
        began = clock(device)
        graph.replay()
        best = min(best, clock(device) - began)
    return best / many


def fresh(*sizes: int, device: torch.device) -> torch.Tensor:
    return torch.randn(sizes, device=device, dtype=torch.bfloat16)


# -- decoding ---------------------------------------------------------------------------------------------------------


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


def peer_row(section: Any, batch: int, compiled: bool, least: float) -> dict[str, Any]:
    """transformers' `generate` of as many random prompts, with as many new tokens: with a growing cache, and with its
    static one, which it compiles."""
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed"}
    transformers, device = importlib.import_module("transformers"), section.device
    settings = config_from_shape(section.sizes.served)
    with torch.device(device):
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompt, tokens = section.sizes.serve_tokens
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(section.sizes.served.vocab, (batch, prompt), generator=numbers).to(device)

    def generate(count: int) -> float:
        more = {"cache_implementation": "static"} if compiled else {}
        began = clock(device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, **more,
        )  # fmt: skip
        return clock(device) - began

    start = generate(tokens)
    first = min(generate(1) for _ in range(2))
    whole = min(generate(tokens) for _ in range(2))
    step = (whole - first) / (tokens - 1)
    return {
        "told": f"{step * 1e3:.2f} ms a step, {batch / step:.0f} tokens/s, {least / step:.1%} of bandwidth; first token "
        f"{first * 1e3:.0f} ms; start {start:.1f} s",
        "version": transformers.__version__,
        "step_s": step,
        "tokens_per_s": batch / step,
        "share_of_bandwidth": least / step,
        "first_token_s": first,
        "start_s": start,
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


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Drawn on the device."""
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
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
        compile=compiled, max_sequences=batch, max_context=context, prefix_cache=False,
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
