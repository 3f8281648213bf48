"""Claim: a tenant whose every request is given up as soon as it is begun holds up another tenant's texts little.

    python benchmarks/serve_tenants.py

Two texts go on, of a model of the size of GPT-2's smallest. Before every step comes a request, whose prompt has 14 tokens,
of another tenant or of the same one, and leaves behind it. Seconds are the process's own, of one thread, so that what else
the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch

from common import ROOT, spread, write
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests.request import Request, Sampling

sys.path.insert(0, str(ROOT / "tests" / "system"))
from served import SHAPE, make_folder

from serve_overload import SEQUENCES, SIZES

ENDLESS = Sampling(max_tokens=400, ignore_eos=True)
WARM = 25
"""Steps that are not counted: what a tenant had left is used up by then, and the engine knows how long steps take."""


def step_seconds(engine: Engine, tenant: str | None, steps: int) -> float:
    """Of a step of two texts, beside prompts of this tenant; None: alone."""
    for number in range(2):
        engine.add(Request(f"text {number}", [1, 2, 3, number] * 3, ENDLESS, tenant="good"))
    engine.step()
    took = []
    for number in range(WARM + steps):
        if tenant is not None:
            engine.add(Request(f"left {number}", [9 + number] + [5] * 13, ENDLESS, tenant=tenant))
        start = time.process_time()
        engine.step()
        took.append(time.process_time() - start)
        engine.cancel(f"left {number}")
    for number in range(2):
        engine.cancel(f"text {number}")
    while engine.busy:
        engine.step()
    return fmean(took[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE.model_copy(update=SIZES["0.1b"])
        path = make_folder(Path(folder) / "model", spread=0.02, shape=shape)
        engine = Engine.load(path, EngineConfig(device="cpu", max_sequences=SEQUENCES))
    rounds = []
    for _ in range(arguments.rounds):
        alone, other, same = (step_seconds(engine, tenant, arguments.steps) for tenant in (None, "bad", "good"))
        rounds.append({"alone, s": alone, "beside another tenant's": other / alone, "beside its own": same / alone})
    result = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    print(json.dumps(result, indent=2))
    write("serve_tenants", {"steps": arguments.steps, "results": result}, ("torch",))


if __name__ == "__main__":
    main()
