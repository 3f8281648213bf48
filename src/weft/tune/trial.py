"""Trial: a layout run for real, for a few steps, in processes of its own, so that whatever ends them ends nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.config.load import load_config, make_config, merge
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.tune import slurm
from weft.whole import write_whole

POLL = 0.05  # seconds
GRACE = 5.0  # seconds from asking a trial to leave to ending it
WARM_UP = 2
"""Steps that allocate and connect before those that count."""
ERROR_OF_RANK = re.compile(r"\[rank\d+\]: ((?:\w+\.)*\w+Error: .*)")
"""How torchrun shows the end of one of its processes."""
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Result:
    """What came of a trial.

    Attributes:
        seconds: median of its steps; None: it failed.
        steps: seconds of each that counts.
        memory: bytes of the fullest process: allocated on a GPU, resident on a CPU.
        failed: why, in a sentence; empty: it did not.
    """

    seconds: float | None = None
    steps: tuple[float, ...] = ()
    memory: int | None = None
    failed: str = ""


def run_trial(config: Config, steps: int, limit: float, folder: Path) -> Result:
    """Train `steps` steps that count, in as many processes as the layout takes; nothing is saved. They are on this machine,
    or on all nodes of the Slurm allocation that this process is in.

    Args:
        limit: seconds, start and all, after which it is ended.
        folder: for settings and logs of this trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, found, output = folder / "config.toml", folder / "found.json", folder / "output.txt"
    settings.write_text(config_toml(config), encoding="utf-8")
    found.unlink(missing_ok=True)
    arguments = [str(settings.resolve()), str(steps), str(found.resolve())]
    if slurm.num_nodes() > 1:
        command = slurm.srun(config.layout.world, "weft.tune.trial:main", arguments)
    else:
        command = [sys.executable, "-m", "weft.tune.trial", *arguments]
    env = {name: value for name, value in os.environ.items() if name not in RANKS}
    with open(output, "wb") as out:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        late = not _ended(process, limit)
    finally:
        _end(process)
    if found.exists() and process.returncode == 0:
        return Result(**{**json.loads(found.read_text(encoding="utf-8")), "failed": ""})
    if late:
        return Result(failed=f"not done after {limit:.0f} s: see --limit")
    return Result(failed=_reason(output, process.returncode))


def _ended(process: subprocess.Popen[bytes], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """The launcher passes SIGTERM on; processes of a launcher that is killed die with it."""
    if process.poll() is None:
        process.terminate()
        if not _ended(process, GRACE):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(output: Path, code: int) -> str:
    """The line in which the trial said why it failed."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("weft: error: ") for line in lines if line.startswith("weft: error: ")]
    errors += [found[1] for line in lines if (found := ERROR_OF_RANK.fullmatch(line))]
    plain = [line for line in lines if line and not line.startswith(" ")]
    killed = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return (errors or plain[-1:] or [killed])[0]


# -- inside of the trial ----------------------------------------------------------------------------------------------


def start(arguments: list[str]) -> int:
    """In a process of its own: the launcher, or, for a single process, the training itself."""
    from weft.launch.local import launch

    config = load_config(arguments[:1])
    try:
        return launch(config.layout.world, "weft.tune.trial:main", arguments, logs=Path(arguments[0]).parent / "logs")
    except ValueError as error:  # of a single process
        print(f"weft: error: {error}", file=sys.stderr)
        return 2


def main(arguments: list[str]) -> int:
    """Entry of each process: settings, steps that count, and the file for what is found."""
    from weft.launch.process import start_process, stop_process

    config, steps = load_config(arguments[:1]), int(arguments[1])
    process = start_process(config.train.device, layout=config.layout)
    try:
        result = train_steps(config, process, steps)
        if process.is_main:
            write_whole(Path(arguments[2]), json.dumps(asdict(result)))
    finally:
        stop_process()
    return 0


def train_steps(config: Config, process: Any, steps: int) -> Result:
    """The steps of a run with its data, in every process; each gets the same result."""
    import torch
    import torch.distributed as dist

    from weft.train.data import open_loader
    from weft.train.step import train_step
    from weft.train.training import build

    training = build(config, process.device)
    loader = open_loader(config, "train", check_tokens=False)
    times = []
    for step in range(WARM_UP + steps):
        rows = training.take(loader.batch(step * config.train.global_batch, training.rows))
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        begin = time.perf_counter()
        # the loss goes to the CPU inside: when that is there, so is the step
        train_step(training.woven, training.optimizer, training.scaler, rows, lr=config.optimizer.lr, clip_norm=1.0)
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        times.append(time.perf_counter() - begin)
    counted = torch.tensor([*times[WARM_UP:], float(peak_memory(process.device))], dtype=torch.float64)
    dist.all_reduce(counted, dist.ReduceOp.MAX)  # the slowest, and the fullest
    *slowest, memory = counted.tolist()
    return Result(statistics.median(slowest), tuple(slowest), int(memory))


def peak_memory(device: Any) -> int:
    """Bytes: allocated on this GPU, or resident in this process, at most so far."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trial_config(config: Config, steps: int, tokens: Path) -> Config:
    """The run's settings for a trial; on random tokens where the run has no data."""
    changes: dict[str, Any] = {
        "run": str(tokens.parent / "run"),
        "train": {"steps": WARM_UP + steps, "eval_every": 0},
        "schedule": {"warmup": 0, "decay": 0},
        "checkpoint": {"every": 0},
        "log": {"view": "off", "tensorboard": False},
    }
    if not config.data.paths:
        if not tokens.with_suffix(".idx").exists():
            from weft.verify.resume import write_random_tokens

            tokens.parent.mkdir(parents=True, exist_ok=True)
            write_random_tokens(tokens, config.model.vocab, config.seq)
        changes["data"] = {"paths": [str(tokens)]}
    return make_config(merge(config.model_dump(), changes))


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
