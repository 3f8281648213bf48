"""What each way to save memory saves and costs: peak memory and seconds a step, beside none of them and beside the plan.

    python benchmarks/savings.py                 # every case; some minutes on a CPU
    python benchmarks/savings.py --only full     # cases whose name has this in it, anew; the others stay as measured before
    python benchmarks/savings.py --model qwen2.5-0.5b --seq 2048 --batch 8    # on a GPU, say

Each case is one process of its own that trains some steps on random tokens. Measured is, on a CPU, the peak of the resident
memory (VmHWM of Linux), on a GPU the peak of what torch has allocated; the seconds are the median of the steps after
the first two: on a CPU those of the process's own work (`time.process_time`, one thread), so that what else the machine
does hardly counts, on a GPU the clock's. `memory` and `time` are over those of the case `none`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import measured, shown, write
from memory import GIVE_BACK, LLAMA, fullest, peak_resident
from weft.config.load import load_config, make_config
from weft.config.toml import config_toml
from weft.plan.memory.moments import layout_memory

CASES: dict[str, tuple[str, dict]] = {  # layout, optimizer
    "none": ("single", {}),
    "full": ("full", {}),
    "full, every 2nd": ("full/2", {}),
    "full, first 4": ("full:4", {}),
    "selective": ("selective", {}),
    "all but attention": ("keep-attention", {}),
    "mlp": ("redo-mlp", {}),
    "attention": ("redo-attention", {}),
    "chunked loss": ("chunked", {}),
    "chunked loss, full": ("chunked.full", {}),
    "muon": ("single", {"kind": "muon"}),
    "moments of 8 bits": ("single", {"states": "8bit"}),
    "activations offloaded": ("offload", {}),
    "activations offloaded, full": ("full.offload", {}),
    "optimizer offloaded": ("offloadoptimizer", {}),
    "bf16": ("bf16", {}),
    "weights offloaded": ("offloadweights.bf16", {}),
    "bf16, gradients in bf16": ("bf16.bf16grads", {}),
    "fp8": ("fp8", {}),
    "fp8row": ("fp8row", {}),
    "bf16, chunked loss, full": ("chunked.full.bf16", {}),
}
STEPS = 5


def one(file: str) -> None:
    """In a process of its own: train, and print the peak and the seconds of each step."""
    import torch

    from weft.launch.process import start_process, stop_process
    from weft.train.step import train_step
    from weft.train.training import build
    from weft.verify.trace import step_rows

    config = load_config([file])
    process = start_process(config.train.device, layout=config.layout)
    training, seconds = build(config, process.device), []
    cuda = process.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    for step in range(1, config.train.steps + 1):
        rows = step_rows(training, None, step)
        begin = clock()
        train_step(
            training.woven, training.optimizer, training.scaler, rows, lr=1e-4, clip_norm=1.0
        )  # waits for its loss
        seconds.append(clock() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    stop_process()
    print(json.dumps({"peak": peak, "seconds": seconds, "device": process.device.type}))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    layout, optimizer = CASES[name]
    sizes = {"global_batch": options.batch, "seq": options.seq, "steps": STEPS}
    tree = {"model": options.model or LLAMA, "layout": layout, "train": sizes, "optimizer": optimizer}
    config = make_config(tree)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(config_toml(config), encoding="utf-8")
        environment = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, "--one", str(file)]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    [stage] = layout_memory(config, found["device"])
    most = fullest(stage, saving=False)
    planned = most.tensors if found["device"] == "cuda" else most.total
    return {
        "layout": layout,
        "measured_mib": round(found["peak"] / 2**20),
        "planned_mib": round(planned / 2**20),
        "error": round(planned / found["peak"] - 1, 4),
        "seconds": round(statistics.median(found["seconds"][2:]), 4),
        "moment": most.moment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it, and none")
    parser.add_argument("--model", help="a preset; 12 blocks of 768 by default")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seq", type=int, default=512, help="tokens of each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    cases: dict[str, dict[str, Any]] = {}
    for name in CASES:
        if options.only in name or name == "none":
            cases[name] = found = measure(name, options)
            base = cases["none"]
            found["memory"] = round(found["measured_mib"] / base["measured_mib"], 3)
            found["time"] = round(found["seconds"] / base["seconds"], 3)
            told = f"{found['measured_mib']:>7} MiB  planned {found['planned_mib']:>7} ({found['error']:+.1%})"
            print(f"{name:30}{told}  {found['seconds']:.3f} s  memory × {found['memory']:.2f}  time × {found['time']:.2f}",
                  flush=True)  # fmt: skip
    model = options.model or "12 blocks of 768, 32,000 tokens"
    sizes: dict[str, Any] = {"model": model, "batch": options.batch, "seq": options.seq}
    before = measured("savings")
    if options.only and all(before.get(key) == value for key, value in sizes.items()):
        kept = before["cases"] | cases
        cases = {name: kept[name] for name in CASES if name in kept}
    print(f"written: {shown(write('savings', sizes | {'cases': cases}))}")


if __name__ == "__main__":
    main()
