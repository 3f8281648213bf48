"""Claim: the command line answers in less than 0.3 seconds; nothing heavy is imported before a verb needs it.

    python benchmarks/startup.py

Each row is a fresh interpreter; wall and CPU seconds, median, smallest and largest of the rounds, all rows taking turns.
The peers show what there is to save: Python alone, typer alone (on which the command line stands), and torch, which most
training tools import before they print their help.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from common import alternate, shown, spread, write

ROWS = {
    "python": ["-c", "pass"],
    "import typer": ["-c", "import typer"],
    "weft --help": ["-m", "weft", "--help"],
    "weft train --help": ["-m", "weft", "train", "--help"],
    "weft train --dry-run": ["-m", "weft", "train", "--model", "gpt2-124m", "--layout", "fsdp8.tp2", "--dry-run"],
    "import weft.config": ["-c", "import weft.config.load"],
    "import weft.plan": ["-c", "import weft.plan.show.report"],
    "import torch": ["-c", "import torch"],
}
LIMIT = 0.3


class Start:
    """Starts one interpreter and waits for its end; keeps its CPU seconds."""

    def __init__(self, arguments: list[str]) -> None:
        self.command, self.cpu = [sys.executable, *arguments], list[float]()

    def __call__(self) -> float:
        begin, before = time.perf_counter(), os.times()
        subprocess.run(self.command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        self.cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    starts = {name: Start(arguments) for name, arguments in ROWS.items()}
    for start in starts.values():
        start()  # from the disk into its cache
        start.cpu.clear()
    walls = alternate(dict(starts), options.rounds)
    rows = {}
    for name, start in starts.items():
        rows[name] = {"wall_s": spread(walls[name]), "cpu_s": spread(start.cpu)}
        wall = rows[name]["wall_s"]
        print(f"{name:22} {wall['median']:.3f} s ({wall['min']:.3f} to {wall['max']:.3f})  CPU {min(start.cpu):.3f} s")
    fast = rows["weft --help"]["wall_s"]["min"] < LIMIT
    print(f"weft --help {'is' if fast else 'is NOT'} below {LIMIT} s")
    print(f"written: {shown(write('startup', {'limit_s': LIMIT, 'rows': rows}, ('typer', 'pydantic', 'torch')))}")


if __name__ == "__main__":
    main()
