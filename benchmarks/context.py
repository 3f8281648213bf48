"""Claim: which way of cutting a sequence is fastest depends on its length, the heads and the network; here is what it is.

    python benchmarks/context.py
    python benchmarks/context.py --seqs 65536 --ways 4    # a quarter of an hour, and beside the rows that are there already

The three kinds of context parallelism, on the same model, sequence and number of processes, one thread each. All three
are alive at once and take turns; who waits sleeps. `ratio` is the step time of all-gather over that of the other, of
steps that were neighbours in time: above 1, the other one is faster. One sequence a step, one block, whole steps.

Rows of the same input that were measured before are kept; `load` tells how many processes wanted the machine when a row
was begun. With more of them than cores the times tell little: look at `cpu_ratio`, the same of CPU seconds over all
processes, which is the work and not the waiting. Messages go through memory here; over a network their share is larger.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from common import alternate, measured, shown, spread, write
from cutting import Processes
from weft.models.shape import Shape

SHAPE = Shape(num_layers=1, hidden=128, num_heads=8, num_kv_heads=4, ffn=352, vocab=1024, max_seq=65536)
KINDS = ("allgather", "ring", "ulysses")
SEQS = (4096, 8192, 16384, 32768, 65536)


def compare(ways: int, options: argparse.Namespace) -> dict[str, Any]:
    """The kinds against all-gather, at one length of sequence."""
    with tempfile.TemporaryDirectory() as folder:
        places = {kind: Path(folder) / kind for kind in KINDS}
        for place in places.values():
            place.mkdir()
        sides = {kind: Processes(f"cp{ways}.{kind}", options.threads, options, places[kind]) for kind in KINDS}
        for side in sides.values():  # the first step allocates and connects
            side()
            side.cpu.clear()
        walls = alternate(dict(sides), options.rounds)
        for side in sides.values():
            side.stop()
    cpu = {kind: side.cpu for kind, side in sides.items()}
    return {
        kind: {
            "ratio": spread([a / b for a, b in zip(walls["allgather"], walls[kind], strict=True)]),
            "cpu_ratio": spread([a / b for a, b in zip(cpu["allgather"], cpu[kind], strict=True)]),
            "tokens_per_s": spread([options.seq / wall for wall in walls[kind]], 1),
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=list(SEQS))
    parser.add_argument("--ways", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.set_defaults(shape=SHAPE, batch=1)
    options = parser.parse_args()
    given = {"threads": options.threads, "rounds": options.rounds, "parameters": SHAPE.num_params}
    before = measured("context")
    rows: dict[str, Any] = before["runs"] if before.get("input") == given else {}
    for seq in options.seqs:
        for ways in options.ways:
            load = os.getloadavg()[0]
            found = compare(ways, argparse.Namespace(**{**vars(options), "seq": seq}))
            rows[f"{seq} tokens, {ways} processes"] = found | {"load": round(load, 1)}
            others = (f"{kind} {found[kind]['ratio']['median']:.2f}" for kind in KINDS[1:])
            print(f"{seq:6} tokens, {ways} processes: speed over all-gather's: {', '.join(others)}", flush=True)
            path = write("context", {"input": given, "runs": rows})  # so far: the long ones take minutes each
    print(f"written: {shown(path)}")


if __name__ == "__main__":
    main()
