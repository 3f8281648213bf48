"""Claim: profiling costs nothing where it is off, and little while it is on.

    python benchmarks/profile_overhead.py

One process trains a small Llama on a CPU, through weft's own trainer. Sides, step by step in turn, in the other order every
second round, so that what is compared stood beside each other in time:

    off        a step of a run that nobody asks for a trace; rank 0's look for a request is in it, and timed apart
    on         a step inside of a capture: ranges, shapes, allocations, Kineto

All times are of the process's CPU, on one thread: other work on the machine makes a step wait, and would be measured
with it.

Reported: the step of each side, the ratio on / off of neighbours, the microseconds that a look costs, and the seconds that
writing the trace takes after the last traced step, with its size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from common import alternate, shown, spread, write
from weft.config.load import make_config
from weft.config.tree import Config
from weft.launch.process import start_process, stop_process
from weft.profile.capture import step_folder
from weft.profile.request import Request
from weft.train.trainer import Trainer
from weft.verify.resume import write_random_tokens


def settings(folder: Path, hidden: int, layers: int, seq: int, batch: int) -> Config:
    data = folder / "tokens"
    write_random_tokens(data, 4096, 400)
    return make_config(
        {
            "run": str(folder / f"run-{hidden}"),
            "model": {"family": "llama", "num_layers": layers, "hidden": hidden, "num_heads": 4, "num_kv_heads": 2,
                      "ffn": 11 * hidden // 4, "vocab": 4096, "max_seq": seq},
            "data": {"paths": [str(data)]},
            "train": {"steps": 100_000, "global_batch": batch, "seq": seq, "device": "cpu"},
            "log": {"view": "off", "tensorboard": False},
        }
    )  # fmt: skip


def step(trainer: Trainer) -> float:
    """Seconds of one step, as the loop makes it."""
    start = time.process_time()
    with trainer.capture.step(trainer.step + 1):
        trainer.whole_step()
    return time.process_time() - start


def look(trainer: Trainer, times: int = 2000) -> float:
    """Seconds of one look for a request."""
    start = time.process_time()
    for _ in range(times):
        assert not trainer.capture.asked
    return (time.process_time() - start) / times


def captured(trainer: Trainer, folder: Path) -> tuple[float, float, int]:
    """Seconds of a step in a capture, of writing its trace, and the trace's bytes."""
    capture = trainer.capture
    capture.request = Request(trainer.step + 1, 1, (0,))
    capture.before(trainer.step + 1)
    seconds = step(trainer)
    start = time.process_time()
    capture.after(trainer.step)
    written = time.process_time() - start
    [trace] = step_folder(folder, trainer.step).glob("*.trace.json.gz")
    return seconds, written, trace.stat().st_size


def measure(config: Config, rounds: int) -> dict:
    process = start_process("cpu", layout=config.layout)
    found: list[tuple[float, float, int]] = []
    with Trainer(config, process) as trainer:
        for _ in range(3):
            step(trainer)
        captured(trainer, Path(config.run))  # Kineto's own start

        def on() -> float:
            found.append(captured(trainer, Path(config.run)))
            return found[-1][0]

        sides = alternate({"off": lambda: step(trainer), "on": on}, rounds)
        looks = [look(trainer) for _ in range(5)]
    stop_process()
    return {
        "parameters": config.model.num_params,
        "off_ms": spread([1e3 * it for it in sides["off"]]),
        "on_ms": spread([1e3 * it for it in sides["on"]]),
        "on_over_off": spread([on / off for on, off in zip(sides["on"], sides["off"], strict=True)]),
        "look_us": spread([1e6 * it for it in looks], 2),
        "look_share_of_a_step": round(statistics.median(looks) / statistics.median(sides["off"]), 7),
        "writing_ms": spread([1e3 * it[1] for it in found]),
        "trace_bytes": int(statistics.median(it[2] for it in found)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for words, sizes in {"small": (128, 4, 64, 4), "larger": (256, 4, 128, 8)}.items():
            results[words] = measure(settings(Path(name), *sizes), options.rounds)
            one = results[words]
            told = f"off {one['off_ms']['median']:.1f} ms, on / off {one['on_over_off']['median']:.3f}"
            print(f"{words}: {told}, a look {one['look_us']['median']:.1f} µs", flush=True)
    print(f"written: {shown(write('profile_overhead', {'rounds': options.rounds, 'models': results}))}")


if __name__ == "__main__":
    main()
