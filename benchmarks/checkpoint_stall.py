"""Claim: a weft checkpoint, with a digest of every byte, holds the training up no longer than torch DCP's async_save.

    python benchmarks/checkpoint_stall.py

One process trains a small GPT (forward, backward, fused AdamW; fp32) without pause. In turn, each side saves weights
and both moments in the background while it trains on:

    weft       weft.checkpoint.Checkpointer: staging buffers used again, sha256 of every region, fsync, manifest, rename
    dcp        torch.distributed.checkpoint.async_save as it comes: a thread, a new staging buffer every time
    dcp kept   the same with one DefaultStager for all saves: its buffers are used again too

Counted for every save: the *stall*, seconds inside of the call; and the *cost*, by how much the steps from the call to
the end of the writing took longer in all than as many steps without a save, the stall included (on a CPU the writer
takes cores from the training, which a GPU would not feel). Both as shares of the median step without a save, timed
beside each save. Ratios are of neighbours in time. The first save of each side, which makes the buffers, is reported
apart. weft's writing includes the removal of its older checkpoint; DCP's is removed outside of the time.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn.functional import cross_entropy

from weft.checkpoint.folder import step_path
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.save import Checkpointer
from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.verify.checkpoint import verify_checkpoint

RESULTS = Path(__file__).parent / "results" / "checkpoint_stall.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
Wait = Callable[[], bool]  # whether the save is done


class Training:
    def __init__(self, shape: Shape, batch: int) -> None:
        torch.manual_seed(0)
        self.shape, self.batch = shape, batch
        self.model = Decoder(shape)
        self.parameters = dict(self.model.named_parameters())
        self.adamw = torch.optim.AdamW(self.parameters.values(), lr=1e-4, fused=True)

    def step(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        tokens = torch.randint(self.shape.vocab, (self.batch, self.shape.max_seq))
        logits = self.model(tokens)
        cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        self.adamw.step()
        self.adamw.zero_grad()
        return time.perf_counter() - begin

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {f"{m}.{name}": self.adamw.state[p][m] for m in MOMENTS for name, p in self.parameters.items()}
        return {name: p.detach() for name, p in self.parameters.items()} | moments


class Weft:
    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder, self.count = training, folder, 0
        self.checkpointer = Checkpointer(folder, training.shape, keep=1, group=dist.group.WORLD)

    def save(self) -> Wait:
        self.count += 1
        pieces = {n: Piece(Region.whole(n, tuple(t.shape)), t) for n, t in self.training.tensors().items()}
        model = [pieces[name] for name in self.training.parameters]
        self.checkpointer.save(self.count, model, [pieces[n] for n in pieces if n[:4] == "exp_"], {"layout": "single"})
        running = self.checkpointer._running  # its own steps: writing, then removing the older one
        assert running is not None
        return running.done

    def end(self) -> None:
        self.checkpointer.wait()

    def check(self) -> None:
        assert verify_checkpoint(step_path(self.folder, self.count)).whole


class Dcp:
    def __init__(self, training: Training, folder: Path, keep_buffers: bool) -> None:
        self.training, self.folder, self.count = training, folder, 0
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if keep_buffers else None
        self.future: Future[Any] | None = None

    def save(self) -> Wait:
        self.count += 1
        path = self.folder / str(self.count)
        future = dcp.async_save(self.training.tensors(), checkpoint_id=path, async_stager=self.stager)
        self.future = future
        return future.done

    def end(self) -> None:
        assert self.future is not None
        self.future.result()

    def check(self) -> None:
        assert (self.folder / str(self.count) / ".metadata").exists()
        shutil.rmtree(self.folder)


def measure(training: Training, side: Weft | Dcp, plain_steps: int) -> dict[str, float]:
    plain = [training.step() for _ in range(plain_steps)]
    begin = time.perf_counter()
    done = side.save()
    stall = time.perf_counter() - begin
    steps = 0
    while not done() or steps == 0:
        training.step()
        steps += 1
    beside = time.perf_counter() - begin
    side.end()
    side.check()
    plain += [training.step() for _ in range(plain_steps)]
    usual = statistics.median(plain)
    cost = beside - steps * usual
    return {"step": usual, "stall": stall, "cost": cost, "steps_beside": steps,
            "stall_share": stall / usual, "cost_share": cost / usual}  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": (names or [platform.processor()])[0], "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}


def commit() -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain-steps", type=int, default=3, help="steps before and after each save, for comparison")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape = Shape(family="gpt2", num_layers=options.layers, hidden=options.hidden, num_heads=6, vocab=8192, max_seq=256)
    training = Training(shape, options.batch)
    training.step()

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        temp = Path(name)
        sides: dict[str, Weft | Dcp] = {
            "weft": Weft(training, temp / "weft"),
            "dcp": Dcp(training, temp / "dcp", keep_buffers=False),
            "dcp kept": Dcp(training, temp / "kept", keep_buffers=True),
        }
        first = {side: measure(training, saver, 1) for side, saver in sides.items()}
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in range(options.repeats):
            for side in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
                rounds[side].append(found := measure(training, sides[side], options.plain_steps))
                told = (
                    f"stall {found['stall']:.3f} s = {found['stall_share']:.1%} of a step, cost {found['cost']:.2f} s"
                )
                print(f"{repeat + 1}: {side:8} step {found['step']:.2f} s, {told}", flush=True)
    dist.destroy_process_group()

    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/checkpoint_stall.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "input": {
            "parameters": shape.num_params,
            "bytes": sum(tensor.nbytes for tensor in training.tensors().values()),
            "tokens_per_step": options.batch * shape.max_seq,
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
        },
        "first_save": first,
    }
    for side, found in rounds.items():
        keys = ("step", "stall", "stall_share", "cost", "cost_share")
        results[side] = {key: spread([one[key] for one in found]) for key in keys}
        share, cost = results[side]["stall_share"], results[side]["cost_share"]
        print(f"{side:8} stall {share['median']:.1%} of a step ({share['min']:.1%} to {share['max']:.1%}); ", end="")
        print(f"cost {cost['median']:.2f} steps ({cost['min']:.2f} to {cost['max']:.2f})")
    for peer in ("dcp", "dcp kept"):
        ratios = [b["stall"] / a["stall"] for a, b in zip(rounds["weft"], rounds[peer], strict=True)]
        results[f"stall of {peer} over weft"] = ratio = spread(ratios)
        print(f"stall of {peer} over weft: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
