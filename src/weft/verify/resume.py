"""Proof that a run which was killed and resumed is the run that was never broken."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from weft.checkpoint.folder import MANIFEST, step_path, unfinished_path
from weft.config.layout import Layout
from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.data.indexed import IndexedWriter, token_dtype
from weft.train.log import read_log
from weft.train.run import Run
from weft.verify.continuation import Death, ResumeReport, compare
from weft.verify.layout import Difference, Progress
from weft.verify.runs import RunProcess

TRIES = 4
"""Runs that may end before the kill reaches them; each is killed sooner than the one before, the last one at once."""


def verify_resume(
    config: Config,
    k: int,
    folder: Path,
    resume_layout: Layout | None = None,
    progress: Progress = lambda what, done, total: None,
    seed: int | None = None,
) -> ResumeReport:
    """Train 2k steps without a break; train them again, killed after the checkpoint of step k, and resumed.

    Every process of the second run gets a real SIGKILL at a random moment between the checkpoint of step k and that of
    step 2k. On the same layout everything is compared bit for bit, under another one within the bounds of parity. On a GPU
    both runs are deterministic (train/kernels.py): some of its usual kernels add in another order each time.

    Args:
        folder: for the two runs, `unbroken/` and `killed/`. Random tokens are written there where the config has none.
        progress: is told which run, its steps so far and their total.
        seed: of the moment; by default it is another one each time.

    Raises:
        ValueError: a run refused its settings.
        RuntimeError: a run failed.
    """
    settings = settings_of(config, k, folder)
    killed = settings.model_copy(update={"run": str(folder / "killed")})
    resumed = killed.model_copy(update={"layout": resume_layout or killed.layout})
    resumed.layout.check(resumed.model, resumed.train.global_batch, resumed.seq)
    with RunProcess(settings) as run:
        run.wait(lambda step: progress("without a break", step, 2 * k))
    death, when = kill_after_save(killed, k, save_interval(Run(Path(settings.run)), k), progress, random.Random(seed))
    with RunProcess(resumed, resume=True) as run:
        run.wait(lambda step: progress("killed, resumed", step, 2 * k))
    differences = [*_resumed_from(Path(killed.run), k, when), *compare(settings, resumed, k)]
    layouts = str(settings.layout), str(resumed.layout)
    return ResumeReport(layouts, k, death, differences, deterministic=settings.train.deterministic)


def settings_of(config: Config, k: int, folder: Path) -> Config:
    """The config's run, of 2k steps with a checkpoint after k, in `folder/unbroken`."""
    changes: dict[str, object] = {
        "run": str(folder / "unbroken"),
        "train": {"steps": 2 * k, "deterministic": config.train.deterministic or on_gpu(config)},
        "checkpoint": {"every": k, "keep": 2},
        "log": {"every": 1, "tensorboard": False, "view": "off"},
    }
    if not config.data.paths:
        folder.mkdir(parents=True, exist_ok=True)
        changes["data"] = {"paths": (write_random_tokens(folder / "tokens", config.model.vocab, config.seq),)}
    return make_config(merge(config.model_dump(), changes))


def on_gpu(config: Config) -> bool:
    return config.train.device != "cpu" and torch.cuda.is_available()


def write_random_tokens(prefix: Path, vocab: int, seq: int, documents: int = 100) -> str:
    """A token file of random documents, each long enough for two sequences."""
    stream = np.random.default_rng(0)
    with IndexedWriter(prefix, token_dtype(vocab)) as writer:
        for _ in range(documents):
            writer.add(stream.integers(vocab, size=2 * seq + 1))
    return str(prefix)


def save_interval(run: Run, k: int) -> float:
    """Seconds between the checkpoints of step k and 2k."""
    first, last = ((step_path(run.checkpoints, step) / MANIFEST).stat().st_mtime for step in (k, 2 * k))
    return last - first


def kill_after_save(
    config: Config, k: int, interval: float, progress: Progress, stream: random.Random
) -> tuple[Death, float]:
    """Start the run, and kill it between the checkpoints of step k and 2k: how it died, and when."""
    run = Run(Path(config.run))
    for attempt in range(TRIES):
        share = 0.8 * stream.random() * (TRIES - 1 - attempt) / (TRIES - 1)
        where = config if attempt == 0 else config.model_copy(update={"run": f"{config.run}-again-{attempt}"})
        path = Run(Path(where.run)).checkpoints
        with RunProcess(where) as process:
            process.wait(lambda step: progress("to be killed", step, 2 * k), step_path(path, k).exists)
            time.sleep(share * interval)
            process.kill()
        if not step_path(path, 2 * k).exists():
            if attempt:
                run.path.rename(f"{run.path}-too-late")
                Path(where.run).rename(run.path)
            death = Death(read_log(run.path)[-1]["step"], unfinished_path(run.checkpoints, 2 * k).exists())
            return death, time.time()
    raise RuntimeError(f"the run in {run.path} ended before it could be killed: give it more --steps")


def _resumed_from(run: Path, k: int, killed: float) -> Iterator[Difference]:
    """That the resumed part began behind step k: the log keeps the time of every step."""
    before = sum(line["time"] < killed for line in read_log(run))
    yield Difference("state", f"resumed after step {before}", k, float(before != k), 0.0)
