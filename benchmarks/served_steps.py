"""Claim: a step of few tokens is faster as one call of C++ than operation by operation in the model's own code.

    python benchmarks/served_steps.py

One engine, whose steps take turns: as one call (`serve/steps/stack.py`), and by the model's own code, with the same kernels
for products and attention. What a step takes is the median of a run's, in the thread's own time.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from common import alternate, shown, spread, write
from serve_engine import DTYPES, SIZES
from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling

TINY = Shape(family="gpt2", num_layers=4, hidden=256, num_heads=4, ffn=1024, vocab=512, max_seq=1024)
MODELS = {"124M": SIZES["124M"], "mixture": SIZES["mixture"], "tiny": TINY}
PROMPT = 32


def compare(name: str, dtype: str, texts: int, tokens: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = Decoder(MODELS[name]).to(DTYPES[dtype])
    engine = Engine(model, None, EngineConfig(max_sequences=texts, max_waiting=texts, prefix_cache=False))
    stack = engine.runner.stack
    assert stack is not None, "there is no C++ compiler"

    def side(one_call: bool) -> float:
        engine.runner.stack = stack if one_call else None
        for text in range(texts):
            engine.add(Request(str(text), [text + 1] * PROMPT, Sampling(max_tokens=tokens)))
        took = []
        while engine.busy:
            start = time.thread_time()
            engine.step()
            took.append(time.thread_time() - start)
        return median(took)

    sides = {"one call": lambda: side(one_call=True), "own code": lambda: side(one_call=False)}
    found = alternate(sides, rounds + 1)  # the first round warms up
    pairs = list(zip(found["one call"][1:], found["own code"][1:], strict=True))
    return {
        "model": name, "dtype": dtype, "texts": texts, "ms": spread([1e3 * ours for ours, _ in pairs]),
        "over own code": spread([ours / own for ours, own in pairs]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=17, help="new ones of each text")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        for dtype in DTYPES:
            for texts in (1, 8):
                rows.append(compare(name, dtype, texts, options.tokens, options.rounds))
                print(rows[-1], flush=True)
    path = write("served_steps", {"prompt": PROMPT, "new": options.tokens, "rows": rows}, ("torch",))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
