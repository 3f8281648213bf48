"""Claim: the memory that `weft train … --dry-run` predicts is within 10 % of what the training processes take.

    python benchmarks/memory.py                  # every case; some minutes on a CPU
    python benchmarks/memory.py --only pp2       # cases whose name has this in it, anew; the others stay as measured before

Each case starts real processes, as many as its layout takes, which train some steps with weft's Trainer on random tokens.
Measured is the peak of the resident memory (VmHWM of Linux) of each process, interpreter and all; the largest process is
held against the plan of the largest process. `error` is (planned − measured) / measured. The saving of a checkpoint is
part of the cases that say so. The GPU's side of this claim is in benchmarks/gpu.py.

The plan counts tensors. So that memory is what tensors take, freed ones are given back to the system at once here
(MALLOC_MMAP_THRESHOLD_, a setting of glibc). As it comes, glibc keeps freed memory in a heap, and what lies between
gradients that stay is not used again: `--heap` measures that too, as `heap_mib`, and `heap` is its excess.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import measured, shown, write
from weft.config.load import load_config, make_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.plan.memory.moments import NAMES, Memory, StageMemory, layout_memory

GPT2 = {"preset": "gpt2-124m", "max_seq": 256}
LLAMA = {
    "family": "llama", "num_layers": 12, "hidden": 768, "num_heads": 12, "num_kv_heads": 4, "ffn": 2048, "vocab": 32000,
    "max_seq": 512,
}  # fmt: skip
SMALL = {**LLAMA, "num_layers": 8, "hidden": 512, "num_heads": 8, "ffn": 1408}

CASES: dict[str, tuple[dict, str, int, int]] = {  # model, layout, sequences of a step, tokens of each
    "gpt2": (GPT2, "single", 4, 256),
    "gpt2 mb1": (GPT2, "mb1", 4, 256),
    "gpt2 full": (GPT2, "full", 8, 256),
    "gpt2 bf16": (GPT2, "bf16", 4, 256),
    "llama": (LLAMA, "single", 4, 512),
    "llama selective": (LLAMA, "selective", 4, 512),
    "llama full": (LLAMA, "full", 4, 512),
    "llama bf16": (LLAMA, "bf16", 4, 512),
    "llama bf16 mb1 full": (LLAMA, "bf16.mb1.full", 4, 512),
    "small dp2": (SMALL, "dp2", 8, 512),
    "small fsdp2": (SMALL, "fsdp2", 8, 512),
    "small fsdp2 zero1 mb2": (SMALL, "fsdp2.zero1.mb2", 8, 512),
    "small fsdp2 bf16": (SMALL, "fsdp2.bf16", 8, 512),
    "small tp2": (SMALL, "tp2", 8, 512),
    "small tp2 sp": (SMALL, "tp2.sp", 8, 512),
    "small pp2": (SMALL, "pp2", 8, 512),
    "small pp2 gpipe": (SMALL, "pp2.gpipe", 8, 512),
    "small saving": (SMALL, "single", 4, 256),
}
STEPS = 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def settings(name: str, folder: Path) -> Config:
    model, layout, batch, seq = CASES[name]
    saving = "saving" in name
    return make_config(
        {
            "run": str(folder / "run"),
            "model": model,
            "layout": layout,
            "data": {"paths": [str(folder / "tokens")]},
            "train": {"global_batch": batch, "seq": seq, "steps": STEPS, "device": "cpu"},
            "checkpoint": {"every": 1 if saving else 0},
            "log": {"view": "off", "tensorboard": False},
        }
    )


def work(arguments: list[str]) -> int:
    """One process: train, and write down the peak of its memory."""
    from weft.launch.process import start_process, stop_process
    from weft.train.trainer import Trainer

    config = load_config([arguments[0]])
    process = start_process("cpu", layout=config.layout)
    with Trainer(config, process) as trainer:
        if config.checkpoint.every:
            trainer.train()
        else:
            for _ in range(STEPS):
                trainer.train_step(trainer.next_rows(), trainer.learning_rate())
                trainer.step, trainer.samples = trainer.step + 1, trainer.samples + config.train.global_batch
    (Path(config.run) / f"peak-{process.rank}").write_text(str(peak_resident()))
    stop_process()
    return 0


def peak_resident() -> int:
    """Bytes, of this process since it began its program."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise ValueError("this machine does not tell the peak of a process's memory: Linux is needed")


def one(file: str, world: int) -> int:
    """In a process of its own: the launcher, or, for a single process, the training itself."""
    from weft.launch.local import launch

    here = str(Path(__file__).parent)
    logs, environment = Path(file).parent / "logs", {"PYTHONPATH": here}
    return launch(world, f"{Path(__file__).stem}:work", [file], logs=logs, env=environment)


def measure(name: str, heap: bool) -> dict[str, Any]:
    config, measured = run(name, GIVE_BACK)
    planned = [fullest(stage, bool(config.checkpoint.every)) for stage in layout_memory(config)]
    most = max(planned, key=lambda memory: memory.total)
    found = {
        "layout": str(config.layout),
        "measured_mib": [round(peak / 2**20) for peak in measured],
        "planned_mib": [round(memory.total / 2**20) for memory in planned],
        "error": round(most.total / max(measured) - 1, 4),
        "moment": most.moment,
        "terms_mib": {term: round(getattr(most, term) / 2**20) for term in NAMES if getattr(most, term)},
    }
    if heap:
        _, kept = run(name, {})
        found |= {"heap_mib": [round(peak / 2**20) for peak in kept], "heap": round(max(kept) / max(measured) - 1, 4)}
    return found


def run(name: str, allocator: dict[str, str]) -> tuple[Config, list[int]]:
    """Bytes of the largest process of each stage."""
    import numpy as np

    from weft.data.indexed import IndexedWriter, token_dtype

    with TemporaryDirectory() as temp:
        folder = Path(temp)
        config = settings(name, folder)
        with IndexedWriter(folder / "tokens", token_dtype(config.model.vocab)) as writer:
            for seed in range(100):
                writer.add(np.random.default_rng(seed).integers(config.model.vocab, size=1000).tolist())
        Path(config.run).mkdir()
        file = Path(config.run) / "config.toml"
        file.write_text(config_toml(config), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | allocator
        command = [sys.executable, __file__, "--one", str(file), str(config.layout.world)]
        subprocess.run(command, check=True, env=environment)
        peaks = [int((Path(config.run) / f"peak-{rank}").read_text()) for rank in range(config.layout.world)]
    per_stage = len(peaks) // config.layout.pp
    return config, [max(peaks[first : first + per_stage]) for first in range(0, len(peaks), per_stage)]


def fullest(stage: StageMemory, saving: bool) -> Memory:
    """The plan of a run that ends before it saves has no such moment."""
    return max((m for m in stage.moments if saving or "saving" not in m.moment), key=lambda memory: memory.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--heap", action="store_true", help="measure with glibc's own heap too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.exit(one(options.one[0], int(options.one[1])))
    chosen = [name for name in CASES if options.only in name]
    if not chosen:
        parser.error(f"--only {options.only}: no case has this in its name. There are {', '.join(CASES)}")
    cases = {}
    for name in chosen:
        cases[name] = found = measure(name, options.heap)
        told = f"measured {found['measured_mib']} MiB, planned {found['planned_mib']}"
        told += f", {found['heap']:+.0%} in a heap" if options.heap else ""
        print(f"{name:22} {found['error']:+7.1%}  {told}, {found['moment']}", flush=True)
    worst = max(cases.values(), key=lambda case: abs(case["error"]))
    print(f"largest error {worst['error']:+.1%} ({worst['layout']})")
    if options.only:
        kept = measured("memory").get("cases", {}) | cases
        cases = {name: kept[name] for name in CASES if name in kept}
    largest = max((case["error"] for case in cases.values()), key=abs)
    print(f"written: {shown(write('memory', {'largest_error': largest, 'cases': cases}))}")


if __name__ == "__main__":
    main()
