"""Graphs in NVIDIA's own backends of Triton against weft's stand-ins: the same files and requests, taking turns.

    python benchmarks/triton_backends.py --triton /opt/tritonserver
    python benchmarks/triton_backends.py --triton /opt/tritonserver --pytorch aoti    # a Triton older than 26.03

`--triton` is an installed Triton that has NVIDIA's backends `onnxruntime` and `pytorch`, as in its containers, or built
from its source. A Triton older than 26.03 refuses the platform `torch_aoti` of a backend `pytorch`, but of no backend
that it has not heard of: there NVIDIA's library, of 26.05 or later, may lie as `backends/NAME/libtriton_NAME.so`, and
`--pytorch` is NAME.

First both are asked for what is easily wrong: logits, alone and in batches, against the model's; texts that cannot be
read, among others. Then for the time: requests of one text each, of the same length, sent at once. A ratio is NVIDIA's
seconds over the stand-in's of neighbouring runs: below 1, NVIDIA's is faster.
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from common import alternate, shown, spread, write
from serve_triton import make_model, triton
from weft.checkpoint.weights import load_decoder
from weft.export.triton.graph import Logits
from weft.export.triton.repository import export_triton
from weft.models.shape import Shape

NAMES = {"onnxruntime": ("input_ids", "logits"), "aoti": ("INPUT__0", "OUTPUT__0")}


def given(backend: str, tokens: np.ndarray) -> list[Any]:
    tensor = grpc.InferInput(NAMES[backend][0], list(tokens.shape), "INT64")
    tensor.set_data_from_numpy(tokens)
    return [tensor]


def ask(client: Any, backend: str, tokens: np.ndarray) -> np.ndarray:
    return client.infer(backend, given(backend, tokens)).as_numpy(NAMES[backend][1])


def at_once(client: Any, backend: str, texts: list[np.ndarray]) -> list[np.ndarray | Exception]:
    """What each text, a request of its own, gets."""
    found: list[Any] = [None] * len(texts)
    left = threading.Semaphore(0)

    def tell(number: int, result: Any, error: Exception | None) -> None:
        found[number] = error or result.as_numpy(NAMES[backend][1])
        left.release()

    for number, text in enumerate(texts):
        client.async_infer(backend, given(backend, text), partial(tell, number))
    for _ in texts:
        assert left.acquire(timeout=600)
    return found


def seconds(client: Any, backend: str, texts: list[np.ndarray]) -> float:
    start = time.perf_counter()
    found = at_once(client, backend, texts)
    assert all(isinstance(one, np.ndarray) for one in found), found
    return time.perf_counter() - start


def check(client: Any, backend: str, module: Logits) -> dict[str, Any]:
    """What is easily wrong."""
    shape, numbers = module.model.shape, np.random.default_rng(0)
    worst = 0.0
    for size in ((1, 1), (3, 7), (32, 5), (1, shape.max_seq)):
        tokens = numbers.integers(shape.vocab, size=size)
        with torch.inference_mode():
            wants = module(torch.from_numpy(tokens)).numpy()
        worst = max(worst, float(np.linalg.norm(ask(client, backend, tokens) - wants) / np.linalg.norm(wants)))
    texts = [np.full((1, 9), shape.vocab if number == 5 else number) for number in range(16)]
    found = at_once(client, backend, texts)
    wrong = [n for n, one in enumerate(found) if not (isinstance(one, np.ndarray) and np.isnan(one).any() == (n == 5))]
    try:
        empty = str(ask(client, backend, np.zeros((1, 0), np.int64)).shape)
    except InferenceServerException as error:
        empty = str(error.message())[:100]
    return {
        "difference": f"{worst:.1e}",
        "wrong_beside_an_unknown_token": wrong,
        "too_long_is_nan": bool(np.isnan(ask(client, backend, np.ones((1, shape.max_seq + 1), np.int64))).all()),
        "empty": empty,
        "answers_still": ask(client, backend, texts[0]).shape == (1, 9, shape.vocab),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 256, "layers": 4, "vocab": 4096, "length": 64, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--triton", type=Path, required=True, help="folder of a Triton that has NVIDIA's backends")
    parser.add_argument("--pytorch", default="pytorch", help="name there of NVIDIA's pytorch backend")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    options = parser.parse_args()
    shape = Shape(
        family="llama", num_layers=options.layers, hidden=options.hidden, num_heads=options.hidden // 64,
        vocab=options.vocab, max_seq=512, ffn=8 * options.hidden // 3 // 16 * 16,
    )  # fmt: skip
    results: dict[str, Any] = {"model": shape.model_dump(exclude_none=True), "checks": {}, "rows": []}
    with TemporaryDirectory() as scratch:
        source, ours, theirs = (Path(scratch) / name for name in ("source", "ours", "theirs"))
        make_model(source, shape)
        for backend in NAMES:
            export_triton(source, ours / backend, backend, backend)
        shutil.copytree(ours, theirs)
        config = theirs / "aoti/aoti/config.pbtxt"
        config.write_text(config.read_text().replace('backend: "pytorch"', f'backend: "{options.pytorch}"'))
        module = Logits(load_decoder(source)[1].eval())
        for backend in NAMES:
            with (
                triton(ours / backend) as (weft, _),
                triton(theirs / backend, "--triton", str(options.triton)) as (nvidia, _),
            ):
                sides = {"weft": weft, "nvidia": nvidia}
                results["checks"][backend] = {side: check(client, backend, module) for side, client in sides.items()}
                print(results["checks"][backend], flush=True)
                for batch in options.batches:
                    results["rows"].append(compare(sides, backend, batch, options))
                    print(results["rows"][-1], flush=True)
    print(shown(write("triton_backends", results, ("torch", "onnxruntime", "tritonclient"))))


def compare(sides: dict[str, Any], backend: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    numbers = np.random.default_rng(batch)
    texts = [numbers.integers(options.vocab, size=(1, options.length)) for _ in range(batch)]
    runs = {side: partial(seconds, client, backend, texts) for side, client in sides.items()}
    for run in runs.values():
        run()
    found = alternate(runs, options.rounds)
    return {
        "backend": backend,
        "requests": batch,
        "ratio": spread([theirs / ours for ours, theirs in zip(found["weft"], found["nvidia"], strict=True)]),
        "ms": {side: spread([1e3 * one for one in times], 1) for side, times in found.items()},
    }


if __name__ == "__main__":
    main()
