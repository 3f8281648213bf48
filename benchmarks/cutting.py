"""Claim: cutting the work over two processes costs little of the machine: what the network and waiting take is small.

    python benchmarks/cutting.py
    python benchmarks/cutting.py --layouts tp2 tp2.sp --rounds 9

Two processes with one thread each against one process with two threads, on the same cores: the same model, the same global
batch, whole steps. Both are alive at once and take turns, so that other work on the machine meets both; the one that waits
sleeps. `ratio` is the tokens/s of two processes over those of one, of two steps that were neighbours in time: 1 means that
cutting costs nothing, 0.85 that it costs 15 %. `bubble` is the share that a pipeline of so many micro-batches waits at the
best, (p - 1)/(m + p - 1), which is part of its cost. `cpu_ratio` is the same of CPU seconds, over all processes: the work
that is done more, without the waiting; on a busy machine it is the steadier figure.

More cores: `--threads 8` compares 2 × 8 threads with 1 × 16. One thread's matrix products are often more efficient than
two threads' together, so that a ratio above 1 is no mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from common import alternate, shown, spread, write
from weft.config.layout import Layout
from weft.config.load import make_config
from weft.models.shape import Shape
from weft.schedules.formula import published_bubble
from weft.schedules.timeline import Costs

SHAPE = Shape(num_layers=8, hidden=512, num_heads=8, num_kv_heads=4, ffn=1408, vocab=8192, max_seq=512)
LAYOUTS = ("dp2", "fsdp2", "fsdp2.zero1", "pp2.mb1", "pp2.mb1.stages5-3", "tp2", "tp2.sp", "dp2.bf16")


class Processes:
    """The processes of one layout, forked from here; each works when it is told to, and sleeps otherwise."""

    def __init__(self, layout: str, threads: int, options: argparse.Namespace, folder: Path) -> None:
        self.world = Layout.parse(layout).world
        self.ends: list[tuple[TextIO, TextIO]] = []
        self.pids = []
        self.cpu: list[float] = []
        for rank in range(self.world):
            told, tell = os.pipe()
            heard, say = os.pipe()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                os.close(tell)
                os.close(heard)
                _serve(layout, rank, self.world, threads, options, folder, os.fdopen(told), os.fdopen(say, "w"))
            os.close(told)
            os.close(say)
            self.ends.append((os.fdopen(tell, "w"), os.fdopen(heard)))
            self.pids.append(pid)

    def __call__(self) -> float:
        """One step; its wall seconds. Those of the CPU, of all processes together, are kept in `cpu`."""
        begin = time.perf_counter()
        self._tell("step")
        lines = [heard.readline() for _, heard in self.ends]
        wall = time.perf_counter() - begin
        if not all(lines):
            raise RuntimeError("a process of the benchmark ended: see above")
        self.cpu.append(sum(map(float, lines)))
        return wall

    def stop(self) -> None:
        self._tell("stop")
        for pid in self.pids:
            os.waitpid(pid, 0)

    def _tell(self, word: str) -> None:
        for tell, _ in self.ends:
            tell.write(f"{word}\n")
            tell.flush()


def _serve(
    layout: str,
    rank: int,
    world: int,
    threads: int,
    options: argparse.Namespace,
    folder: Path,
    told: TextIO,
    say: TextIO,
) -> None:
    """A process: build, then one step for each line that comes. Does not return."""
    from weft.parallel.woven import Rows
    from weft.train.step import train_step
    from weft.train.training import build

    code = 1
    try:
        torch.set_num_threads(threads)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        train = {"global_batch": options.batch, "seq": options.seq}
        training = build(make_config({"model": options.shape, "layout": layout, "train": train}), torch.device("cpu"))
        stream = torch.Generator().manual_seed(0)
        tokens = torch.randint(options.shape.vocab, (options.batch, options.seq + 1), generator=stream)[training.rows]
        rows = Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        for line in told:
            if line.strip() == "stop":
                break
            before = time.process_time()
            train_step(training.woven, training.optimizer, training.scaler, rows, lr=3e-4, clip_norm=1.0)
            say.write(f"{time.process_time() - before}\n")
            say.flush()
        code = 0
    except BaseException:  # noqa: BLE001 (the parent sees that it is gone)
        traceback.print_exc()
    finally:
        os._exit(code)


def compare(layout: str, options: argparse.Namespace) -> dict[str, Any]:
    parsed = Layout.parse(layout)
    single = Layout(precision=parsed.precision)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        sides = {
            "one": Processes(str(single), parsed.world * options.threads, options, Path(one)),
            "cut": Processes(layout, options.threads, options, Path(two)),
        }
        for _ in range(2):  # the first allocates and connects
            for side in sides.values():
                side()
        for side in sides.values():
            side.cpu.clear()
        walls = alternate(dict(sides), options.rounds)
        for side in sides.values():
            side.stop()
    tokens = options.batch * options.seq
    count = parsed.num_micro_batches(options.batch)
    bubble = published_bubble(parsed.schedule, parsed.pp, parsed.vp, count, Costs(1, 1, 1))
    return {
        "ratio": spread([a / b for a, b in zip(walls["one"], walls["cut"], strict=True)]),
        "cpu_ratio": spread([a / b for a, b in zip(sides["one"].cpu, sides["cut"].cpu, strict=True)]),
        "one_tokens_per_s": spread([tokens / wall for wall in walls["one"]], 1),
        "cut_tokens_per_s": spread([tokens / wall for wall in walls["cut"]], 1),
        **({"bubble": round(bubble, 3)} if bubble is not None and parsed.pp > 1 else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process of a cut layout")
    parser.set_defaults(shape=SHAPE)
    options = parser.parse_args()
    rows = {}
    for layout in options.layouts:
        rows[layout] = row = compare(layout, options)
        ratio = row["ratio"]
        waits = f", {row['cpu_ratio']['median']:.2f} in CPU seconds"
        waits += f", bubble {row['bubble']:.1%}" if "bubble" in row else ""
        print(
            f"{layout:20} {ratio['median']:.2f} of one process ({ratio['min']:.2f} to {ratio['max']:.2f}){waits}",
            flush=True,
        )
    given = {"batch": options.batch, "seq": options.seq, "threads": options.threads, "rounds": options.rounds}
    given |= {"parameters": SHAPE.num_params}
    print(f"written: {shown(write('cutting', {'input': given, 'layouts': rows}))}")


if __name__ == "__main__":
    main()
