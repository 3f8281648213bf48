"""Runs of real processes, forked from this warm interpreter: started in milliseconds, to be killed at any moment."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which torch imports on the way, in seconds: once here, not in every process
import torch.distributed as dist

from forking import count_gpus
from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.train import trainer
from weft.train.hardware import peak_flops
from weft.train.run import Run
from weft.verify.resume import write_random_tokens

SHAPE = {
    "family": "llama", "num_layers": 2, "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "ffn": 48, "vocab": 67,
    "max_seq": 32, "init_std": 0.1,
}  # fmt: skip
count_gpus()
OUTPUTS: dict[int, Path] = {}
"""Process → the file of what it prints."""


def settings(run: Path, layout: str = "single", **over: object) -> Config:
    """A small run beside its data, which are random tokens."""
    data = run.parent / "tokens"
    if not data.with_suffix(".idx").exists():
        write_random_tokens(data, SHAPE["vocab"], 16)
    tree: dict = {
        "run": str(run),
        "model": SHAPE,
        "layout": layout,
        "data": {"paths": [str(data)], "split": [80, 20, 0]},
        "train": {"steps": 12, "global_batch": 8, "seq": 16, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"view": "off", "tensorboard": False},
    }
    return make_config(merge(tree, over))


def cut(config: Config, layout: str, run: Path | None = None) -> Config:
    """The same run under another layout, or in another folder."""
    return make_config({**config.model_dump(), "layout": layout, "run": str(run or config.run)})


def start(config: Config, *, resume: bool = False, work: Callable[[Config], None] = trainer.run) -> list[int]:
    """Claim the run's folder and train in as many processes as the layout takes."""
    Run(Path(config.run)).claim(config, resume)
    torch.set_num_threads(1)  # a child of a parent with threads would hang
    peak_flops(torch.device("cpu"), config.layout.compute)  # measured once, for all children
    gc.collect()  # a child that cleared away a process group of ours would wait for threads that it does not have
    store = tempfile.mktemp(prefix="store-", dir=config.run)
    return [_fork(config, rank, store, work) for rank in range(config.layout.world)]


def end(pids: list[int], seconds: float = 60) -> list[int]:
    """Exit codes of processes, of all of them. What keeps one that does not end is told."""
    codes: dict[int, int] = {}
    limit = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and os.waitpid(pid, os.WNOHANG)[0]:
                codes[pid] = 0
        if time.monotonic() > limit:
            left = [pid for pid in pids if pid not in codes]
            kill(left, signal.SIGABRT)  # of which each writes where it stands
            told = "\n".join(OUTPUTS[pid].read_text() for pid in left)
            raise AssertionError(f"{len(left)} processes did not end:\n{told}")
        time.sleep(0.005)
    return list(codes.values())


def kill(pids: list[int], by: signal.Signals = signal.SIGKILL) -> None:
    """A signal to all of them; returns when they are gone."""
    for pid in pids:
        os.kill(pid, by)
    for pid in pids:
        os.waitpid(pid, 0)


def train(config: Config, *, resume: bool = False, work: Callable[[Config], None] = trainer.run) -> Path:
    """Train to the end; its newest checkpoint. The first error of any process comes back."""
    pids = start(config, resume=resume, work=work)
    end(pids)
    if errors := failures(Path(config.run)):
        raise AssertionError(next((text for text in errors.values() if "gloo" not in text), str(errors)))
    return max((Path(config.run) / "checkpoints").iterdir())


def failures(run: Path) -> dict[int, str]:
    """Rank → the traceback of the error that ended it."""
    return {int(file.stem.removeprefix("error-")): file.read_text() for file in sorted(run.glob("error-*.txt"))}


def until(condition: Callable[[], object], pids: list[int] | None = None, seconds: float = 60) -> None:
    """Wait for something; while processes run, if they are named."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        for pid in pids or []:
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "ended before"
        time.sleep(0.0005)


def _fork(config: Config, rank: int, store: str, work: Callable[[Config], None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    run = Path(config.run)
    error, output, world = run / f"error-{rank}.txt", run / f"output-{rank}.txt", config.layout.world
    error.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        OUTPUTS[pid] = output
        return pid
    try:
        sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115 (closed by the end)
        faulthandler.enable(sys.stderr)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ |= dict(zip(names, map(str, (rank, rank, world, world)), strict=True))
        os.environ.pop("MASTER_ADDR", None)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        work(config)
        os._exit(0)
    except BaseException:  # noqa: BLE001 (told to the parent)
        error.write_text(traceback.format_exc())
    finally:
        os._exit(1)
    return 0
