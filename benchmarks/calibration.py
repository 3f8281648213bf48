"""Claim: after calibration, the predicted step times of layouts of two processes are right, and so is their order.

    python benchmarks/calibration.py                          # calibrates, predicts, measures: about ten minutes
    python benchmarks/calibration.py --cluster here.toml      # predicts from a file of `weft plan calibrate`
    python benchmarks/calibration.py --priority -10           # as root, on a machine that others use

The machine is measured as `weft plan calibrate --processes 2` does it. Nothing of the layouts is known by then: curves
are of products, attention, element-wise operations, updates and messages, at sizes of their own. Each layout's step is
predicted, and then measured: whole training steps of real processes with one thread each, all of them alive at once,
and taking turns round by round, so that other work on the machine meets all. A turn is three steps, of which the first
does not count: it finds its memory where the system has put what nobody used for a while. Before and after each step
both processes do a reference, work of always the same size. `measured` is the median of the steps, each over the
references beside it, times the reference's time in quiet moments (the fastest fifth of the run; curves are of such
moments too); `as_it_came` is the median of the steps alone. `noise` is how far the medians of every other round are
apart, as a mean over the layouts: no prediction can be shown to be better.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch._dynamo  # or each forked process would
import torch.distributed as dist
import torch.nn.functional as F

from common import shown, write
from weft.config.load import make_config
from weft.config.tree import Config
from weft.launch.process import Process
from weft.plan.machine import Cluster, read_cluster
from weft.plan.numbers import Job
from weft.plan.show.text import write_cluster
from weft.plan.time.counted import counted_time
from weft.plan.time.step import PARTS, Time
from weft.tune.clock import quiet

LLAMA = {
    "family": "llama", "num_layers": 8, "hidden": 256, "num_heads": 8, "num_kv_heads": 4, "ffn": 704, "vocab": 4096,
    "max_seq": 128,
}  # fmt: skip
MIXTRAL = {**LLAMA, "family": "mixtral", "num_layers": 4, "ffn": 352, "experts": {"num_experts": 8, "per_token": 2}}
CASES = [
    (LLAMA, layout)
    for layout in (
        "dp2", "dp2.mb1", "dp2.chunked", "dp2.selective", "dp2.mb2.full", "fsdp2", "fsdp2.zero1.mb2", "fsdp2.zero2.mb1",
        "fsdp2.full.mb1", "tp2", "tp2.sp", "tp2.sp.mb2", "pp2.mb1", "pp2.gpipe.mb2", "pp2.vp2.interleaved.mb1",
        "pp2.zbh1.mb1", "pp2.zbv.mb1", "cp2", "cp2.ring", "cp2.ulysses", "dp2.bf16",
    )
] + [(MIXTRAL, "dp2"), (MIXTRAL, "fsdp2.ep2")]  # fmt: skip
BATCH, SEQ, WORLD = 8, 128, 2
STEPS = 2
"""Of each turn, that count."""
SLOW, FEW = 4.0, 2
"""A layout whose step takes more seconds than SLOW has FEW turns."""


def settings(model: dict[str, Any], layout: str) -> Config:
    return make_config({"model": model, "layout": layout, "train": {"global_batch": BATCH, "seq": SEQ}})


# -- processes --------------------------------------------------------------------------------------------------------


def fork(work: Callable[[int], None], store: Path) -> list[int]:
    """Two processes that share a group, forked from here."""
    pids = []
    for rank in range(WORLD):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", store=dist.FileStore(str(store), WORLD), rank=rank, world_size=WORLD)
                work(rank)
                code = 0
            except BaseException:  # noqa: BLE001 (the parent sees that it is gone)
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


class Reference:
    """Some work as a step has it, of always the same size: how busy the machine is with others."""

    def __init__(self) -> None:
        self.x, self.up, self.down = torch.rand(512, 256), torch.rand(704, 256), torch.rand(256, 704)
        for weight in (self.up, self.down):
            weight.requires_grad_()

    def __call__(self) -> None:
        for _ in range(2):
            y = self.x + F.linear(F.silu(F.linear(self.x, self.up)), self.down)
            torch.autograd.grad(y.square().mean(), (self.up, self.down))


class Steps:
    """The processes of one layout; each does a step when it is told to, and sleeps otherwise."""

    def __init__(self, config: Config, store: Path) -> None:
        pipes = [(os.pipe(), os.pipe()) for _ in range(WORLD)]
        self.pids = fork(lambda rank: self.serve(config, os.fdopen(pipes[rank][0][0]), pipes[rank][1][1]), store)
        self.ends: list[tuple[TextIO, TextIO]] = []
        for (told, tell), (heard, say) in pipes:
            os.close(told)
            os.close(say)
            self.ends.append((os.fdopen(tell, "w"), os.fdopen(heard)))

    def serve(self, config: Config, told: TextIO, say: int) -> None:
        from weft.parallel.woven import Rows
        from weft.train.step import train_step
        from weft.train.training import build

        training = build(config, torch.device("cpu"))
        tokens = torch.randint(config.model.vocab, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
        tokens = tokens[training.rows]
        rows = Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        reference = Reference()
        for line in told:
            if line.strip() == "stop":
                return
            begin = time.perf_counter()
            if line.strip() == "step":
                train_step(training.woven, training.optimizer, training.scaler, rows, lr=3e-4, clip_norm=1.0)
            else:
                reference()
            os.write(say, f"{time.perf_counter() - begin}\n".encode())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Else they stand still."""
        self.send(signal.SIGCONT)
        yield
        self.send(signal.SIGSTOP)

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def __call__(self, what: str = "step") -> float:
        """Seconds of a step, or of the reference, of the slower process."""
        self.tell(what)
        lines = [heard.readline() for _, heard in self.ends]
        if not all(lines):
            raise RuntimeError("a process of the benchmark ended: see above")
        return max(map(float, lines))

    def tell(self, word: str) -> None:
        for tell, _ in self.ends:
            tell.write(f"{word}\n")
            tell.flush()

    def stop(self) -> None:
        self.send(signal.SIGCONT)
        self.tell("stop")
        for pid in self.pids:
            os.waitpid(pid, 0)


def prefer(priority: int) -> None:
    """Let this process and those that it forks go before others. Linux shares by session first: so it does too."""
    os.nice(priority)
    group = Path("/proc/self/autogroup")
    if group.exists():
        os.setsid()
        group.write_text(str(priority))


# -- the three parts --------------------------------------------------------------------------------------------------


def calibrated(folder: Path) -> Cluster:
    from weft.tune.calibrate import calibrate

    def work(rank: int) -> None:
        found = calibrate(Process(rank, WORLD, rank, torch.device("cpu")), "full")
        if rank == 0:
            write_cluster(found, folder / "cluster.toml")

    for pid in fork(work, folder / "calibrate"):
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("calibration failed: see above")
    return read_cluster(str(folder / "cluster.toml"))


def predict(config: Config, cluster: Cluster) -> Time:
    assert cluster.curves is not None
    return counted_time(config.model, config.layout, Job(seq=SEQ, global_batch=BATCH), cluster.curves)


def measure(configs: list[Config], rounds: int, folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of the steps of each that count, turn by turn: as they came, and as they would be with the reference beside
    them as fast as in quiet moments."""
    sides = [Steps(config, folder / f"store-{index}") for index, config in enumerate(configs)]
    for side in sides:
        with side.turn():
            side("reference")  # it is built
    times: list[list[float]] = [[] for _ in sides]
    references: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        for index in range(len(sides))[:: 1 if turn % 2 == 0 else -1]:
            if turn < FEW or statistics.median(times[index]) < SLOW:
                with sides[index].turn():
                    sides[index]()
                    beside = [sides[index]("reference")]
                    for _ in range(STEPS):
                        times[index].append(sides[index]())
                        beside.append(sides[index]("reference"))
                references[index] += [statistics.mean(pair) for pair in pairwise(beside)]
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    for side in sides:
        side.stop()
    best = quiet(list(chain(*references)))
    pairs = [zip(*both, strict=True) for both in zip(times, references, strict=True)]
    return times, [[step * best / reference for step, reference in pair] for pair in pairs]


def score(predicted: list[float], measured: list[float]) -> dict[str, float]:
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]

    def ranks(values: list[float]) -> Any:
        return np.argsort(np.argsort(values))

    best = min(range(len(predicted)), key=predicted.__getitem__)
    return {
        "mape": round(statistics.mean(map(abs, errors)), 4),
        "bias": round(statistics.mean(errors), 4),
        "largest_error": round(max(errors, key=abs), 4),
        "spearman": round(float(np.corrcoef(ranks(predicted), ranks(measured))[0, 1]), 4),
        "regret": round(measured[best] / min(measured) - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="a cluster file; else this machine is calibrated first")
    parser.add_argument("--keep", type=Path, help="write the calibrated cluster into this file too")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each layout, at least 2")
    parser.add_argument("--only", default="", help="layouts whose name has this in it; nothing is written")
    parser.add_argument("--priority", type=int, default=0, help="niceness, below 0 as root")
    options = parser.parse_args()
    if options.priority:
        if os.fork():  # a session of its own is for a process that leads none
            sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        prefer(options.priority)
    cases = [(model, layout) for model, layout in CASES if options.only in layout]
    configs = [settings(model, layout) for model, layout in cases]
    with tempfile.TemporaryDirectory() as folder:
        cluster = read_cluster(options.cluster) if options.cluster else calibrated(Path(folder))
        if options.keep:
            write_cluster(cluster, options.keep)
        times = [predict(config, cluster) for config in configs]
        raw, steps = measure(configs, options.rounds, Path(folder))
    rows = {}
    for (model, layout), time_, found, came in zip(cases, times, steps, raw, strict=True):
        name, median = f"{model['family']} {layout}", statistics.median(found)
        turns = [found[first : first + STEPS] for first in range(0, len(found), STEPS)]
        halves = [statistics.median(chain(*turns[first::2])) for first in (0, 1)]
        rows[name] = {
            "predicted": round(time_.total, 4), "measured": round(median, 4), "error": round(time_.total / median - 1, 4),
            "min": round(min(found), 4), "max": round(max(found), 4), "noise": round(abs(halves[0] / halves[1] - 1), 4),
            "as_it_came": round(statistics.median(came), 4),
            "parts": {part: round(getattr(time_, part), 4) for part in PARTS if getattr(time_, part) > 1e-4},
        }  # fmt: skip
        print(f"{name:34} {rows[name]['error']:+7.1%}  predicted {time_.total:.3f} s, measured {median:.3f} "
              f"({min(found):.3f} to {max(found):.3f}), as it came {statistics.median(came):.3f}", flush=True)  # fmt: skip
    scores: dict[str, Any] = score(
        [row["predicted"] for row in rows.values()], [row["measured"] for row in rows.values()]
    )
    scores["noise"] = round(statistics.mean(row["noise"] for row in rows.values()), 4)
    scores["as_it_came"] = score(
        [row["predicted"] for row in rows.values()], [row["as_it_came"] for row in rows.values()]
    )
    print(", ".join(f"{name} {value}" for name, value in scores.items()))
    if not options.only:
        given = {"batch": BATCH, "seq": SEQ, "rounds": options.rounds, "layouts": len(rows)}
        path = write("calibration", {"input": given, "scores": scores, "layouts": rows})
        print(f"written: {shown(path)}")


if __name__ == "__main__":
    main()
