"""Proof that a run which was killed and resumed is the run that was never broken."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.checkpoint.folder import MANIFEST, checkpoints, step_path, unfinished_path
from weft.checkpoint.load import read_state
from weft.config.layout import Layout
from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.data.indexed import IndexedWriter, token_dtype
from weft.train.log import read_log
from weft.train.run import Run
from weft.verify.layout import LOSS_BOUNDS, Difference
from weft.verify.runs import RunProcess
from weft.verify.saved import same_tensors, tensors_within_bounds

Progress = Callable[[str, int, int], None]

KINDS = {
    "loss": "loss and gradient norm of each step, from the two logs",
    "weight": "each weight after the last step",
    "exp_avg": "Adam's first moment of each weight",
    "exp_avg_sq": "Adam's second moment of each weight",
    "state": "position in the data, updates made, loss scale",
}
"""What is compared."""

TRIES = 4
"""Runs that may end before the kill reaches them; each is killed sooner than the one before, the last one at once."""


@dataclass(frozen=True)
class Death:
    """Where the run was when it was killed: the last step that it had logged, and whether it was saving another one."""

    step: int
    saving: bool


@dataclass(frozen=True)
class ResumeReport:
    """What was compared of a run without a break and of one that was killed and resumed.

    Attributes:
        layouts: of the run, and of the resumed part.
        steps: at which the resumed run took up; both end at twice that.
        differences: `error` counts numbers whose bits differ where `bitwise`, else it is relative.
    """

    layouts: tuple[str, str]
    steps: int
    death: Death
    differences: list[Difference]

    @property
    def bitwise(self) -> bool:
        return self.layouts[0] == self.layouts[1]

    @property
    def right(self) -> bool:
        return all(difference.right for difference in self.differences)

    def of(self, kind: str) -> list[Difference]:
        return [difference for difference in self.differences if difference.kind == kind]

    def first_wrong(self) -> Difference | None:
        """The first step of the logs that differs, else the first tensor, in the order of the model."""
        return next((difference for difference in self.differences if not difference.right), None)


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
    step 2k. On the same layout everything is compared bit for bit, under another one within the bounds of parity.

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
    return ResumeReport((str(settings.layout), str(resumed.layout)), k, death, differences)


def settings_of(config: Config, k: int, folder: Path) -> Config:
    """The config's run, of 2k steps with a checkpoint after k, in `folder/unbroken`."""
    changes: dict[str, object] = {
        "run": str(folder / "unbroken"),
        "train": {"steps": 2 * k},
        "checkpoint": {"every": k, "keep": 2},
        "log": {"every": 1, "tensorboard": False, "view": "off"},
    }
    if not config.data.paths:
        folder.mkdir(parents=True, exist_ok=True)
        changes["data"] = {"paths": (write_random_tokens(folder / "tokens", config.model.vocab, config.seq),)}
    return make_config(merge(config.model_dump(), changes))


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
        share = stream.random() * (TRIES - 1 - attempt) / (TRIES - 1)
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


def compare(unbroken: Config, resumed: Config, k: int) -> Iterator[Difference]:
    """Compare two runs of 2k steps: their logs, then the newest checkpoint of each."""
    bitwise = unbroken.layout == resumed.layout
    precision = max(unbroken.layout.precision, resumed.layout.precision, key=lambda name: LOSS_BOUNDS[name])
    runs = Run(Path(unbroken.run)), Run(Path(resumed.run))
    yield from _losses(runs, k, 0.0 if bitwise else LOSS_BOUNDS[precision])
    a, b = (checkpoints(run.checkpoints)[0] for run in runs)
    states = read_state(a), read_state(b)
    for name in ("step", "data", "optimizer_updates", *(["loss_scaler"] if bitwise else [])):
        yield Difference("state", name, states[0]["step"], float(states[0][name] != states[1][name]), 0.0)
    if bitwise:
        yield from same_tensors(unbroken, a, b)
    else:
        yield from tensors_within_bounds(unbroken, a, b, read_log(runs[0].path), k, precision)


def _losses(runs: tuple[Run, Run], k: int, bound: float) -> Iterator[Difference]:
    """Up to step k both ran alike, so the same bits are asked for."""
    logs = [read_log(run.path) for run in runs]
    for step in range(1, 2 * k + 1):
        lines = [[line for line in log if line["step"] == step] for log in logs]
        if any(len(found) != 1 for found in lines):
            yield Difference("loss", f"logged {len(lines[0])} and {len(lines[1])} times", step, math.inf, 0.0)
            continue
        (one,), (other,) = lines
        same = all(one[name] == other[name] for name in ("loss", "grad_norm", "lr"))
        if step <= k or bound == 0:
            yield Difference("loss", "loss", step, float(not same), 0.0)
        else:
            a, b = (math.nan if line["loss"] is None else line["loss"] for line in (one, other))
            yield Difference("loss", "loss", step, 0.0 if same else abs(a - b) / abs(a), bound)


def _resumed_from(run: Path, k: int, killed: float) -> Iterator[Difference]:
    """That the resumed part began behind step k: the log keeps the time of every step."""
    before = sum(line["time"] < killed for line in read_log(run))
    yield Difference("state", f"resumed after step {before}", k, float(before != k), 0.0)
