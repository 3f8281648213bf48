"""Claim: a compiled engine starts in seconds once what was compiled is kept; weights in huge pages decode sooner.

    python benchmarks/serve_start.py
    python benchmarks/serve_start.py --rounds 1 --layers 2      # to see it run

Each start is a fresh interpreter of one thread, GPT-2 124M's shape in fp32 with random weights: plain; compiled with an
empty cache of torch's compiler; compiled with the cache of a start before; and plain where Linux was asked for no huge
pages (`PR_SET_THP_DISABLE`). All take turns. From the interpreter's start to the first new token in the clock's seconds;
then a new token of one text, in milliseconds of the thread's own work, the median of its steps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, alternate, shown, spread, write

PR_SET_THP_DISABLE = 41
PROMPT, TOKENS = 32, 33
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def start(folder: str, compile: bool, small_pages: bool, began: float) -> None:
    """In an interpreter of its own: prints the seconds of the start, and the milliseconds of a token."""
    if small_pages and ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError("this Linux cannot be asked for small pages")
    import torch

    from weft.serve.config import EngineConfig
    from weft.serve.engine import Engine
    from weft.serve.requests.request import Request, Sampling

    torch.set_num_threads(1)
    engine = Engine.load(Path(folder), EngineConfig(device="cpu", dtype="float32", compile=compile))
    engine.add(Request("a", list(range(PROMPT)), Sampling(max_tokens=TOKENS)))
    while not any(one.begun for one in engine.scheduler):
        engine.step()
    seconds, steps = time.time() - began, list[float]()
    while engine.busy:
        before = time.process_time()
        engine.step()
        steps.append(1e3 * (time.process_time() - before))
    engine.close()
    print(json.dumps([seconds, statistics.median(steps)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "system"))
    from served import make_folder

    from weft.models.shape import Shape

    shape = Shape(
        family="gpt2", num_layers=options.layers, hidden=768, num_heads=12, ffn=3072, vocab=50257, max_seq=1024
    )
    millis: dict[str, list[float]] = {}
    caches: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name) / "model", spread=0.02, shape=shape)

        def one(side: str, compile: bool = False, small_pages: bool = False, cold: bool = False) -> Callable[[], float]:
            def run() -> float:
                if cold or not caches:
                    caches.append(tempfile.mkdtemp(dir=name))
                code = (
                    f"import serve_start; serve_start.start({str(folder)!r}, {compile}, {small_pages}, {time.time()})"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", CACHE: caches[-1]},
                )  # fmt: skip
                seconds, token = json.loads(done.stdout.splitlines()[-1])
                millis.setdefault(side, []).append(token)
                print(f"{side:14} {seconds:5.1f} s, {token:.1f} ms a token", flush=True)
                return float(seconds)

            return run

        sides = {
            "plain": one("plain"), "compiled, cold": one("compiled, cold", compile=True, cold=True),
            "compiled, warm": one("compiled, warm", compile=True), "small pages": one("small pages", small_pages=True),
        }  # fmt: skip
        sides["plain"]()  # from the disk into its cache, and the kernels made
        millis.clear()
        seconds = alternate(sides, options.rounds)
    rows = {
        side: {
            "start_s": spread(seconds[side], 1), "token_ms": spread(millis[side], 1),
            "token_over_plain": spread([mine / plain for mine, plain in zip(millis[side], millis["plain"], strict=True)]),
        }
        for side in sides
    }  # fmt: skip
    print(json.dumps(rows, indent=1))
    about = {"model": "GPT-2 124M's shape", "layers": options.layers, "prompt": PROMPT, "rounds": options.rounds}
    print(f"written: {shown(write('serve_start', about | {'rows': rows}))}")


if __name__ == "__main__":
    main()
